"""Data preparation and reading: documents -> tokens -> windows -> shards -> batches.

    source.py     Source: one kind of text (shakespeare.py, text_files.py, tfds_source.py)
    sources.py    the sources by name; the documents of a split, one str at a time
    file_list.py  the files of config.data         holdout.py  splits held out of train
    tokenizer.py  text <-> token ids (SentencePiece or bytes)
    windows.py    token documents -> windows of at most L tokens -> records
    build.py      prepare(): runs the three above once, and writes ArrayRecord shards
    manifest.py   source, settings and content of prepared data: manifest.json
    reader.py     Grain readers: batches {'x': int32 [B, L], 'valid': bool [B, L]}

Everything before the reader streams, so memory does not grow with the corpus.
"""
