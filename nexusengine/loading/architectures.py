"""Which family of models/ serves an architecture, by the name in config.json. A new family is entered here."""

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "nexusengine.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "nexusengine.models.llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": "nexusengine.models.llama:LlamaForCausalLM",
}
