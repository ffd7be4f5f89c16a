"""Online serving of a CREM checkpoint: embeddings and answers from one model in memory, over OpenAI's routes."""
