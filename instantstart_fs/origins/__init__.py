"""Where bytes are born: Hugging Face, S3, a directory. They list, pin, authenticate and sign; they move no weights."""
