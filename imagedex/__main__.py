"""The console command, also as `python -m imagedex`."""

from imagedex import endings

endings.leave_at_ctrl_c()  # nobody but the command imports this

from imagedex.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
