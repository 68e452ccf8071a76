"""What a person does with a finished run; none of it needs DeepSpeed or the machine that trained."""
