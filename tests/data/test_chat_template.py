"""Chat templates: found in the files of a model, and rendered as `transformers` does."""

import json

import golden_models
import pytest
from thorough import thorough

from esolm_jax.data import chat_template
from esolm_jax.data.manifest import open_tokenizer
from esolm_jax.errors import UserError

TEMPLATE = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
<{{ m['role'] }}> {{ m['content'] | tojson }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{% endif %}"""
CHAT = [{"role": "user", "content": "Hé, you"}, {"role": "assistant", "content": " so"}]


def files(template, **config) -> dict[str, bytes]:
    config = {"bos_token": {"content": "<s>"}, "eos_token": None} | config
    if template is not None:
        config["chat_template"] = template
    return {chat_template.CONFIG: json.dumps(config).encode()}


@pytest.fixture
def jinja():
    pytest.importorskip("jinja2")


def test_where_templates_are_found():
    assert chat_template.of_files(files(None), "here") is None
    assert chat_template.of_files({}, "here") is None
    found = chat_template.of_files(files("a"), "here")
    assert found.source() == "a" and found.tokens == {"bos_token": "<s>"}
    own_file = files("a") | {chat_template.FILE: b"b"}
    assert chat_template.of_files(own_file, "here").source() == "b"
    several = [{"name": "default", "template": "a"}, {"name": "tools", "template": "c"}]
    found = chat_template.of_files(files(several), "here")
    assert (found.source(), found.source("tools")) == ("a", "c")
    with pytest.raises(UserError, match="chat_template='tool': .*did you mean 'tools'"):
        found.source("tool")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({chat_template.CONFIG: b"{"}, "here/tokenizer_config.json: not JSON"),
        ({chat_template.CONFIG: b"[]"}, "here/tokenizer_config.json: damaged"),
        (files([1]), "chat_template: must be a text or a list"),
    ],
)
def test_damaged_files(content, told):
    with pytest.raises(UserError, match=told):
        chat_template.of_files(content, "here")


@pytest.mark.usefixtures("jinja")
def test_render():
    found = chat_template.of_files(files(TEMPLATE), "here")
    user = '<s><user> "Hé, you"\n'
    assert found.render(CHAT[:1]) == f"{user}<assistant>\n"
    plain = chat_template.of_files(files("{% for m in messages %}{{ m.content }}|{% endfor %}"), "")
    assert plain.render(CHAT, add_generation_prompt=False) == "Hé, you| so"
    assert plain.end_of_turn() == "|"
    with pytest.raises(UserError, match="chat template: no tools"):
        found.render([{"role": "tool", "content": ""}])
    with pytest.raises(UserError, match="chat template: SecurityError"):
        chat_template.of_files(files("{{ ''.__class__.__mro__ }}"), "").render(CHAT)
    with pytest.raises(UserError, match="must keep the content of the last message"):
        chat_template.of_files(files("x"), "").render(CHAT, add_generation_prompt=False)


@pytest.mark.usefixtures("jinja")
def test_what_transformers_renders():
    """With its own files as they are, and its last message to be continued."""
    transformers = pytest.importorskip("transformers")
    for name in ("llada_mha", "dream_tied_bf16", "sdar"):
        folder = golden_models.FOLDER / name
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        found = chat_template.of_files(
            {chat_template.CONFIG: (folder / chat_template.CONFIG).read_bytes()}, name
        )
        for template in (found.source(), TEMPLATE):
            ours = chat_template.ChatTemplate({"default": template}, found.tokens)
            for prompt in (True, False):
                want = theirs.apply_chat_template(
                    CHAT,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    continue_final_message=not prompt,
                )
                assert ours.render(CHAT, add_generation_prompt=prompt) == want


@pytest.mark.parametrize(
    "name", ["llada_mha", *(pytest.param(other, marks=thorough) for other in ("dream", "sdar"))]
)
def test_templates_survive_conversion(name):
    """In the workdir; rendered, they give the ids of the model's own tokenizer."""
    golden = golden_models.read_json(name, "tokenizer_cases")["chat"]
    tokenizer = open_tokenizer(golden_models.workdir(name) / "tokenizer")
    found = chat_template.of_tokenizer(tokenizer)
    config = golden_models.read_json(name, "tokenizer_config")
    assert found.source() == config["chat_template"]
    pytest.importorskip("jinja2")
    text = found.render(golden["messages"], add_generation_prompt=True)
    assert text == golden["text"]
    assert tokenizer.recognizing().encode(text, add_special_tokens=False).ids == golden["ids"]
