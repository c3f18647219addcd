"""`proreflow <verb>`, and `python -m proreflow_jax`, which lists the verbs. The verbs themselves are the other files here."""

import sys

from proreflow_jax.run.verbs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
