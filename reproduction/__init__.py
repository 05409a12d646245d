"""Both papers' tables, small: ``python -m reproduction.run --data cifar10/``. Not part of the installed package."""
