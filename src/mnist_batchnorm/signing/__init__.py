"""Sign and verify the model files.

signer: sign a folder, or find out why its signature is invalid.
keys: create and read keys.
selected_files: which files model signing hashes.
"""
