"""Looking at what the compiler's passes did: renderers of pass records, which they only read."""
