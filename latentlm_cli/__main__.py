"""``python -m latentlm_cli`` is ``latentlm``."""

from latentlm_cli.app import main

if __name__ == "__main__":
    main()
