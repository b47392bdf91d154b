"""The command `baton`: generate, info, demo."""
