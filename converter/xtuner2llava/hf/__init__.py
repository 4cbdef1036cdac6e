"""What LlavaForConditionalGeneration of transformers needs beside the tensors."""
