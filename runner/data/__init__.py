"""Test set -> texts -> tokens, and answers -> a submission file. Knows no model and no device."""
