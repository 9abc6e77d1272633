"""From microbatches to each owner's singular triplets."""
