"""Model files of other programs, made into folders that mlx-lm loads. Knows no mlx-lm.

`container` reads the header of a GGUF file, `architectures` says how each kind of model maps,
`quantized` how each type of tensor does, `vocabulary` makes the tokenizer's files, `conversion`
writes the folder and `kept` finds the one of an earlier start.
"""
