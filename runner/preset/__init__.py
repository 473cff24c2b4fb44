"""Files of a model -> checked facts about it. Loads no weights and imports no framework."""
