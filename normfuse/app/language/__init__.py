"""Language models as folders: what is asked for, and what becomes of an encoder and a decoder."""
