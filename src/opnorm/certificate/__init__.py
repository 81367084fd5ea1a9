"""What is checked again by others: the Cholesky lemma, the format of a certificate and its verifier.

Nothing here imports the search for bounds.
"""
