"""The sources of model classes that `rows.py` was written for; ci/record_hashes.py writes this."""

# Class -> digest of its source -> the first and the last release that have it.
HASHES: dict[str, dict[str, tuple[str, str]]] = {
    "vllm.model_executor.models.alice_ai:AliceAIForCausalLM": {
        "f8f913723ef9a642": ("0.33.0", "0.33.0"),
    },
    "vllm.model_executor.models.aria:AriaForConditionalGeneration": {
        "05f34a488e5d4810": ("0.11.1", "0.12.0"),
        "39b31c4e3dba596b": ("0.22.0", "0.30.0"),
        "587d047cc66fdb19": ("0.16.0", "0.21.0"),
        "b33bce0a0d97ed01": ("0.31.0", "0.31.0"),
        "d6bb8307c085d9c8": ("0.13.0", "0.13.0"),
        "dd31c6d698680c16": ("0.14.0", "0.14.1"),
        "f4be20560c48218f": ("0.15.0", "0.15.1"),
        "f7030d0e30212e9b": ("0.32.0", "0.33.0"),
    },
    "vllm.model_executor.models.bailing_moe_linear:BailingMoeV25ForCausalLM": {
        "2282d72bb6a7a439": ("0.20.0", "0.20.0"),
        "6994250976a77004": ("0.28.0", "0.33.0"),
        "7ff51d543733818d": ("0.20.1", "0.27.1"),
    },
    "vllm.model_executor.models.bailing_moe_v3:BailingMoeV3ForCausalLM": {
        "9bcf3114010d5a42": ("0.33.0", "0.33.0"),
        "eae58843c45b3e9d": ("0.28.0", "0.32.0"),
    },
    "vllm.model_executor.models.cohere2_moe:Cohere2MoeForCausalLM": {
        "16bbfc1a10738cb2": ("0.21.0", "0.24.0"),
        "63ba978a8338364f": ("0.31.0", "0.33.0"),
        "8d27ecd61dc57308": ("0.29.0", "0.30.0"),
        "fe437b6c5dcc939b": ("0.25.0", "0.28.0"),
    },
    "vllm.model_executor.models.dbrx:DbrxForCausalLM": {
        "c470b8989ea650c2": ("0.11.1", "0.15.1"),
        "d7326f38a67f8698": ("0.16.0", "0.33.0"),
    },
    "vllm.model_executor.models.deepseek_v2:DeepseekV3ForCausalLM": {
        "077f43c4a61e5e7d": ("0.20.0", "0.33.0"),
    },
    "vllm.model_executor.models.deepseek_v2:GlmMoeDsaForCausalLM": {
        "361efc09bb4d3dcb": ("0.20.0", "0.33.0"),
    },
    "vllm.model_executor.models.ernie45_vl:Ernie4_5_VLMoeForConditionalGeneration": {
        "11c0597df3510bc6": ("0.18.0", "0.18.1"),
        "181c8658cf70ed8c": ("0.13.0", "0.14.1"),
        "3c6f31ae0845e62e": ("0.29.0", "0.29.0"),
        "55ee29b08b8f0f57": ("0.30.0", "0.33.0"),
        "573307f58f488136": ("0.28.0", "0.28.0"),
        "6eec7cb8ca392dd8": ("0.15.0", "0.15.1"),
        "86ef48c9adf4fb19": ("0.16.0", "0.17.1"),
        "ac3d59d11a2ad174": ("0.19.0", "0.19.1"),
        "b858b7d7ec42251b": ("0.20.0", "0.27.1"),
        "ec5a57a438abc71a": ("0.11.1", "0.12.0"),
    },
    "vllm.model_executor.models.gpt_oss:GptOssForCausalLM": {
        "4d2934fee9f7b3cf": ("0.12.0", "0.13.0"),
        "77cd4a4fb2e5dab4": ("0.33.0", "0.33.0"),
        "b039b5c165c4e4ad": ("0.17.0", "0.17.1"),
        "b9f0cc7e4b7d8002": ("0.11.1", "0.11.2"),
        "c5e6377015d0cdd0": ("0.18.0", "0.28.0"),
        "d731aaf32b891a0b": ("0.16.0", "0.16.0"),
        "ede0d383d0a3376b": ("0.14.0", "0.15.1"),
        "f46ef77cfe6862f9": ("0.29.0", "0.32.0"),
    },
    "vllm.model_executor.models.granitemoeshared:GraniteMoeSharedForCausalLM": {
        "084a108cc80e500d": ("0.33.0", "0.33.0"),
        "132133c7a0cf0331": ("0.29.0", "0.32.0"),
        "264789519548e861": ("0.12.0", "0.15.1"),
        "26c5cf770a718c54": ("0.16.0", "0.27.1"),
        "6d35874d15b96051": ("0.28.0", "0.28.0"),
        "e32beca4d864c728": ("0.11.1", "0.11.2"),
    },
    "vllm.model_executor.models.kimi_k25:KimiK25ForConditionalGeneration": {
        "165624aeece44d91": ("0.32.0", "0.33.0"),
        "296cc1e6f2863a43": ("0.28.0", "0.29.0"),
        "35187b61ae835b16": ("0.15.0", "0.15.1"),
        "35844274d003f14f": ("0.16.0", "0.16.0"),
        "6537d210753d631e": ("0.22.0", "0.25.1"),
        "70400476a53abebb": ("0.19.0", "0.21.0"),
        "b3e108810bdd0e28": ("0.17.0", "0.17.1"),
        "c5ec4ccd59d0e9dc": ("0.18.0", "0.18.1"),
        "c735928b5fe13c9f": ("0.30.0", "0.31.0"),
        "ebc305f80fb850d4": ("0.26.0", "0.27.1"),
    },
    "vllm.model_executor.models.kimi_vl:KimiVLForConditionalGeneration": {
        "0bf00ad23698890e": ("0.14.0", "0.14.1"),
        "3feea363dd067a66": ("0.24.0", "0.29.0"),
        "40a954a64c71a7e4": ("0.32.0", "0.33.0"),
        "8753352a43632e11": ("0.15.0", "0.15.1"),
        "a74be17107204ab7": ("0.30.0", "0.31.0"),
        "d4cb0b33bf2554e1": ("0.11.1", "0.12.0"),
        "de08dc9b61b4b85b": ("0.13.0", "0.13.0"),
        "fb36faf0f2429609": ("0.16.0", "0.23.0"),
    },
    "vllm.model_executor.models.longcat_flash:LongcatFlashForCausalLM": {
        "237d023474ace31b": ("0.11.1", "0.13.0"),
        "4216225ffe072014": ("0.32.0", "0.33.0"),
        "799b5a63d979c33f": ("0.20.0", "0.20.2"),
        "7a2bd96781a9c58a": ("0.14.0", "0.15.1"),
        "9413bd06187f4d6a": ("0.21.0", "0.31.0"),
        "c726c8e665651797": ("0.16.0", "0.19.1"),
    },
    "vllm.model_executor.models.longcat_flash_ngram:LongcatFlashNgramForCausalLM": {
        "5ba3949fb9e865b3": ("0.26.0", "0.28.0"),
        "82397fcbd1eef557": ("0.32.0", "0.33.0"),
        "83bcd3dfc12a2eaf": ("0.29.0", "0.31.0"),
    },
    "vllm.model_executor.models.mimo_v2:MiMoV2FlashForCausalLM": {
        "7ccd41c0433da30b": ("0.21.0", "0.24.0"),
        "81802bd6c5559123": ("0.25.0", "0.33.0"),
    },
    "vllm.model_executor.models.mimo_v2:MiMoV2ForCausalLM": {
        "d94bee83ec7ade4a": ("0.21.0", "0.33.0"),
    },
    "vllm.model_executor.models.mimo_v2_flash:MiMoV2FlashForCausalLM": {
        "3393c09015d41248": ("0.16.0", "0.17.1"),
        "d42b8237712970b6": ("0.14.0", "0.15.1"),
        "dc5ad923f671f3b7": ("0.18.0", "0.20.2"),
    },
    "vllm.model_executor.models.step3p5:Step3p5ForCausalLM": {
        "3a0bd6265fccbf6d": ("0.25.0", "0.29.0"),
        "62f59d5dd1c05566": ("0.16.0", "0.21.0"),
        "7258f904da05a834": ("0.22.0", "0.23.0"),
        "830e5b337513fccb": ("0.30.0", "0.33.0"),
        "93ddef4711c75826": ("0.24.0", "0.24.0"),
        "eaa174c0d808abdc": ("0.15.1", "0.15.1"),
    },
    "vllm.model_executor.models.step3p7:Step3p7ForConditionalGeneration": {
        "16498b3246deb296": ("0.30.0", "0.32.0"),
        "a4b5aecf86a34a87": ("0.23.0", "0.29.0"),
        "d77658faa270c923": ("0.33.0", "0.33.0"),
    },
    "vllm.models.deepseek_v32.amd.model:DeepseekV32ForCausalLM": {
        "728eb6b65837b5ba": ("0.27.0", "0.33.0"),
    },
    "vllm.models.deepseek_v32.nvidia.model:DeepseekV32ForCausalLM": {
        "68b1be133b39c8c1": ("0.28.0", "0.33.0"),
        "cb2e37fc4c6ec325": ("0.25.0", "0.27.1"),
    },
    "vllm.models.deepseek_v4.nvidia.model:DeepseekV4ForCausalLM": {
        "cbc67f194e0f576b": ("0.32.0", "0.32.0"),
        "ccba1a7a97523efa": ("0.33.0", "0.33.0"),
    },
    "vllm.models.deepseek_v4.xpu.model:DeepseekV4ForCausalLM": {
        "c7087b008cb8241c": ("0.32.0", "0.33.0"),
    },
    "vllm.models.deepseek_v41.amd.vl_model:DeepseekV41ForCausalLM": {
        "4ee443a08e51aa46": ("0.32.0", "0.32.0"),
        "f41741c59e95e4b4": ("0.33.0", "0.33.0"),
    },
    "vllm.models.deepseek_v41.nvidia.vl_model:DeepseekV41ForCausalLM": {
        "3cb0c3cd4edb377f": ("0.32.0", "0.32.0"),
        "4eeee2388c7d69a7": ("0.33.0", "0.33.0"),
    },
    "vllm.models.flint.model:FlintForCausalLM": {
        "dcf94a5c21e08bd6": ("0.33.0", "0.33.0"),
    },
    "vllm.models.glm5next.common.model:Glm5NextForConditionalGeneration": {
        "0424e61bc7429deb": ("0.32.0", "0.33.0"),
        "28065647c23b0223": ("0.31.0", "0.31.0"),
    },
    "vllm.models.glm5next.nvidia.model:Glm5NextForConditionalGeneration": {
        "5855c831aaec8b0c": ("0.30.0", "0.30.0"),
    },
    "vllm.models.hy_v4.amd.model:HYV4ForCausalLM": {
        "115ebfbe64c165f5": ("0.33.0", "0.33.0"),
        "9e17018c305f8a50": ("0.31.0", "0.32.0"),
    },
    "vllm.models.hy_v4.nvidia.model:HYV4ForCausalLM": {
        "9e17018c305f8a50": ("0.29.0", "0.33.0"),
    },
    "vllm.models.minimax_m3.amd.model:MiniMaxM3SparseForCausalLM": {
        "51b9a1ebadd126df": ("0.25.0", "0.32.0"),
        "5f0aa20b5695a811": ("0.33.0", "0.33.0"),
        "fe2fe658466a8748": ("0.24.0", "0.24.0"),
    },
    "vllm.models.minimax_m3.amd.model:MiniMaxM3SparseForConditionalGeneration": {
        "308e640775bd35df": ("0.25.0", "0.30.0"),
        "795accc67873864f": ("0.33.0", "0.33.0"),
        "a8bd065561e5c0be": ("0.31.0", "0.32.0"),
        "d089b949683b7171": ("0.24.0", "0.24.0"),
    },
    "vllm.models.minimax_m3.nvidia.model:MiniMaxM3SparseForCausalLM": {
        "2d8a3260a6598652": ("0.29.0", "0.33.0"),
        "51b9a1ebadd126df": ("0.26.0", "0.28.0"),
        "98130f0a0a6b107a": ("0.24.0", "0.24.0"),
        "c1b9732e6129f235": ("0.25.0", "0.25.1"),
    },
    "vllm.models.minimax_m3.nvidia.model:MiniMaxM3SparseForConditionalGeneration": {
        "041f1b1bcb2e400c": ("0.24.0", "0.24.0"),
        "08cde4f4aff8a023": ("0.26.0", "0.28.0"),
        "8f4d7a8270ed5f88": ("0.31.0", "0.33.0"),
        "96fa31d4f60206d7": ("0.25.0", "0.25.1"),
        "b55e2543b4184831": ("0.29.0", "0.30.0"),
    },
    "vllm.models.muse_spark.amd.multimodal:MuseSparkForConditionalGeneration": {
        "668388eac4759786": ("0.33.0", "0.33.0"),
    },
    "vllm.models.muse_spark.nvidia.multimodal:MuseSparkForConditionalGeneration": {
        "af1d05e21d25d3a4": ("0.33.0", "0.33.0"),
    },
    "vllm.models.qwen4_exp.nvidia.model:Qwen4ExpForCausalLM": {
        "99c3ba5c90d83408": ("0.31.0", "0.31.0"),
        "cd34f3ff8686ffeb": ("0.32.0", "0.33.0"),
    },
    "vllm.models.qwen4_exp.nvidia.model:Qwen4ExpForConditionalGeneration": {
        "01ff58f921cf47c2": ("0.33.0", "0.33.0"),
        "0813569b56bd1b48": ("0.31.0", "0.31.0"),
        "ea966d67c7bf7a7a": ("0.32.0", "0.32.0"),
    },
}
