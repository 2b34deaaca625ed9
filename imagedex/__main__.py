"""`python -m imagedex`: the console command."""

from imagedex.cli import main

main()
