"""Several processes: who they are (`world`), and many images made by all of them (`generate`)."""
