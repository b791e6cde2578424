"""The names of token kinds and selectors, which text may use; `tokens` says what they mean."""

KINDS = ("pad", "system", "question", "image", "newline", "answer", "cls", "query")
TEXT = ("system", "question", "answer")
SELECTORS = (*KINDS[1:], "text", "every", "last", "generating", "all")
