"""A replica of several ranks: its membership, its leader and followers, and its pipeline stages."""
