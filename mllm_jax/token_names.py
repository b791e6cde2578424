"""The names of token kinds and selectors in text; `tokens` defines their meaning."""

KINDS = ("pad", "system", "question", "image", "newline", "answer", "cls", "query")
TEXT = ("system", "question", "answer")
SELECTORS = (*KINDS[1:], "text", "every", "last", "generating", "all")
