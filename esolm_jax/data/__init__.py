"""Data preparation and reading: documents -> tokens -> windows -> shards -> batches.

    source.py     Source: one kind of text (shakespeare.py, text8.py, text_files.py, tfds_source.py)
    sources.py    the sources by name; the documents of a split, one str at a time
    file_list.py  the files of config.data         holdout.py  splits held out of train
    compressed.py, table_files.py, text_documents.py   what is in a file: .gz and .zst; .parquet and
                  .arrow; the documents of a .txt
    document_range.py  train[:-100000]             detokenizers.py  of published data sets
    tokenizer.py  text <-> token ids (SentencePiece, bytes, text8_tokenizer.py, wordpieces.py, …)
    chat_template.py  messages -> text, by the template of a pretrained model
    published_tokenizers.py  the same ids as the published code, special tokens in text included
    windows.py    token documents -> windows of at most L tokens -> records
    pack.py       documents -> windows, as config.data says
    build.py      prepare(): runs all of the above once, and writes ArrayRecord shards
    manifest.py   source, settings and content of prepared data: manifest.json
    later_fields.py  what prepared data of earlier versions do not say
    reader.py     Grain readers: batches {'x': int32 [B, L], 'valid': bool [B, L]}

Everything before the reader streams, so memory does not grow with the corpus.
"""
