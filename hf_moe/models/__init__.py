"""The MoE model classes. Files here travel to the Hub with the models, so they import each other as `.name` only."""
