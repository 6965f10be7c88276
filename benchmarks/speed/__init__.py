"""How fast the library is and how much memory it takes, beside the published package."""
