"""`python -m cbp.engines.ahead` compiles what the compiled engine needs, and leaves it on disk for other processes."""

from cbp.engines.choice import compile_ahead

if __name__ == "__main__":
    compile_ahead()
