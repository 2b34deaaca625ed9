"""`python -m imagedex`: the console command."""

from imagedex.cli import main

if __name__ == "__main__":
    main()
