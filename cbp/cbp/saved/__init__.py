"""What a snapshot says beside its tensors, as strict records: whoever has a file may have written it anew."""
