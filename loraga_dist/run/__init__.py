"""`loraga-dist init`, from the request to the verified directory."""
