"""The instructions of a kernel, read from PTX."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Such as `@%p1 add.s32 %r1, %r2, 4`.

    Attributes:
      guard: (register, whether it must be false) or None: lanes that execute it.
      name: ["add", "s32"].
      operands: a vector {a, b} and an address [a + 4] are one each.
      text: for messages.
    """

    guard: tuple[str, bool] | None
    name: list[str]
    operands: list[str]
    text: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
      threads: of a program. parameters: their names.
      types: of registers, by name without the number: {"%r": "b32"}.
      labels: name → index in `instructions`.
    """

    threads: int
    parameters: list[str]
    types: dict[str, str]
    instructions: list[Instruction]
    labels: dict[str, int]


def parse(text: str, name: str) -> Program:
    """The kernel of this name in a PTX file."""
    text = re.sub(r"//[^\n]*", "", text[text.index(f".entry {name}(") :])
    head, body = text.split("{", 1)
    parameters = re.findall(r"(\w+_param_\d+)", head)
    program = Program(int(re.search(r"\.reqntid (\d+)", head)[1]), parameters, {}, [], {})
    _Reader(program).read(body)
    return program


class _Reader:
    """Reads statements. Braces enclose inline assembly with registers of its own."""

    def __init__(self, program: Program):
        self.program, self.scopes, self.count = program, [{}], 0

    def read(self, body: str) -> None:
        for statement in body.split(";"):
            statement = self._marks(statement.strip())
            if not self.scopes:
                return
            if statement.startswith(".reg"):
                self._declare(*re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups())
            elif statement and not statement.startswith("."):
                self.program.instructions.append(self._instruction(statement))

    def _marks(self, statement: str) -> str:
        """The statement behind labels and braces."""
        while found := re.match(r"([{}]|(\$?\w+):(?!:))\s*", statement):
            if found[1] == "{":
                self.scopes.append({})
                self.count += 1
            elif found[1] == "}":
                self.scopes.pop()
            else:
                self.program.labels[found[2]] = len(self.program.instructions)
            statement = statement[found.end() :]
        return statement

    def _declare(self, kind: str, names: str) -> None:
        for name in re.split(r"\s*,\s*", names.strip()):
            base, number = re.fullmatch(r"([%\w]+)(?:<(\d+)>)?", name).groups()
            if base.startswith("%"):
                self.program.types[base] = kind
                continue
            for one in [base] if number is None else [f"{base}{i}" for i in range(int(number))]:
                self.scopes[-1][one] = f"{one}@{self.count}_"
                self.program.types[f"{one}@{self.count}_"] = kind

    def _instruction(self, text: str) -> Instruction:
        for name, unique in ((n, u) for scope in self.scopes for n, u in scope.items()):
            text = re.sub(rf"(?<![\w%.$@]){name}(?![\w@])", unique, text)
        found = re.fullmatch(r"(?:@(!?)(%?[\w@]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
        guard = (found[2], bool(found[1])) if found[2] else None
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]][^,]*", found[4])
        return Instruction(guard, found[3].split("."), [o.strip() for o in operands], text)


def names(vector: str) -> list[str]:
    """Of `{a, b}`, or of one register."""
    return [name.strip() for name in vector.strip("{} ").split(",")]
