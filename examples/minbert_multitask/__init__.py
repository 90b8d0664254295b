"""minBERT multitask: sentiment, paraphrase and similarity on one small BERT, trained through adapters."""
