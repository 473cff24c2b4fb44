"""Test set -> texts -> tokens, and answers -> a submission file. Knows no models and no devices."""
