"""Two of timm's models, prepared as timm prepares them (here without their weights, so that nothing is downloaded).

pip install timm, then python docs/examples/timm_models.py
"""

import qdv_gpu

images = qdv_gpu.load_images("digits", samples=100)
networks = ["timm:test_resnet=none", "timm:test_vit(img_size=64)=none"]  # or e.g. "timm:convnext_tiny.fb_in1k"
for name in networks:
    network = qdv_gpu.load_network(name)
    print(name, network.image_size, "pixels:", [layer.layer for layer in qdv_gpu.describe_layers(network)])

result = qdv_gpu.analyze(
    networks, images, "runs/timm_models", layers=["layer2", "layer4", "blocks.2", "blocks.5"], image_size=64,
    perplexity=15, iterations=400, seeds=2,
)  # fmt: skip
for layer in result.layers:
    print(f"{layer.network} {layer.layer}: NH {layer.of(5).nh:.3f}")
