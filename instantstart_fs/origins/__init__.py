"""Origins of model files: Hugging Face, S3, a directory. They list, pin, authenticate and sign, but move no bytes."""
