"""ik_llama.cpp on the same file and the same tokens, in a process of its own."""
