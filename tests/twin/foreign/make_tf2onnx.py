"""Writes the tf2onnx-*.onnx files beside it: small Keras classifiers through tf2onnx, and through LiteRT's int8.

Not run by any test: it needs tensorflow, which edgekit does not. In an environment of its own, with what made the files
(Python 3.11, tensorflow-cpu 2.21.0, keras 3.15.1, tf2onnx 1.17.0, onnx 1.23.2, numpy 2.4.6):

    pip install tensorflow-cpu==2.21.0 keras==3.15.1 tf2onnx==1.17.0
    python tests/twin/foreign/make_tf2onnx.py [NAME ...]

Weights are random and seeded; batch normalization holds the statistics of smooth random images, and the last layer
spreads its scores over all classes, so that no file answers every image alike.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import keras
import numpy
import tensorflow as tf
import tf2onnx
from keras import layers

HERE = Path(__file__).parent


def photos(count: int, size: int, seed: int) -> numpy.ndarray:
    """Random images (N, size, size, 3) float32 in [0, 1], every other one smooth, the others noise."""
    draw = numpy.random.default_rng(seed)
    coarse = draw.uniform(-0.2, 1.2, (count, 4, 4, 3)).astype(numpy.float32)
    images = tf.image.resize(coarse, (size, size), "bicubic").numpy().clip(0, 1)
    images[1::2] = draw.uniform(0, 1, images[1::2].shape)
    return images


def norm(x):
    """Batch normalization whose statistics are those of the last batch seen in training mode."""
    spread = keras.initializers.RandomUniform(0.8, 1.5, seed=3)
    shift = keras.initializers.RandomNormal(stddev=0.3, seed=4)
    return layers.BatchNormalization(momentum=0.0, gamma_initializer=spread, beta_initializer=shift)(x)


def relu6(x):
    return layers.ReLU(6.0)(x)


def hard_sigmoid(x):
    """As keras.applications.MobileNetV3 writes it."""
    return layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0)


def hard_swish(x):
    return layers.Multiply()([x, hard_sigmoid(x)])


def gelu(x):
    """By its formula: TensorFlow 2.21 computes its own with Erfc, for which tf2onnx 1.17 writes no operator of ONNX."""
    return layers.Lambda(lambda z: 0.5 * z * (1.0 + tf.math.erf(z * 0.5**0.5)))(x)


# Networks: images -> features; `classifier` adds the head ------------------------------------------------------------


def mobilenet(x):
    """ReLU6, depthwise separable blocks, a stride of 2 after explicit asymmetric padding and with SAME, a residual."""
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    x = relu6(norm(layers.Conv2D(8, 3, 2, padding="valid", use_bias=False)(x)))
    x = relu6(norm(layers.DepthwiseConv2D(3, 2, padding="same", use_bias=False)(x)))
    x = relu6(norm(layers.Conv2D(16, 1, use_bias=False)(x)))
    y = relu6(norm(layers.Conv2D(32, 1, use_bias=False)(x)))
    y = relu6(norm(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)))
    x = layers.Add()([x, norm(layers.Conv2D(16, 1, use_bias=False)(y))])
    return layers.GlobalAveragePooling2D()(x)


def squeeze(x):
    """MobileNetV3's block: squeeze and excitation with a hard sigmoid, hard swish."""
    x = hard_swish(norm(layers.Conv2D(16, 3, 2, padding="same", use_bias=False)(x)))
    y = norm(layers.DepthwiseConv2D(5, 2, padding="same", use_bias=False)(x))
    s = layers.GlobalAveragePooling2D(keepdims=True)(y)
    s = layers.Conv2D(16, 1)(layers.Conv2D(8, 1, activation="relu")(s))
    y = hard_swish(layers.Multiply()([y, hard_sigmoid(s)]))
    y = norm(layers.Conv2D(24, 1, use_bias=False)(y))
    y = layers.Activation("hard_silu")(layers.Conv2D(24, 1)(y))
    y = layers.Multiply()([y, layers.Activation("hard_sigmoid")(layers.Conv2D(24, 1)(y))])
    return layers.Flatten()(layers.GlobalAveragePooling2D(keepdims=True)(y))


def pools(x):
    """Every pool with SAME, a flatten over NHWC, dense layers with batch normalization."""
    x = layers.Conv2D(8, 5, 2, padding="same", activation="relu")(x)
    a = layers.AveragePooling2D(3, 2, padding="same")(x)
    b = layers.MaxPooling2D(3, 2, padding="same")(x)
    c = layers.MaxPooling2D(2)(layers.Conv2D(8, 3, padding="same", dilation_rate=2, activation="elu")(x))
    x = layers.Concatenate()([a, b, c])
    y = layers.GlobalMaxPooling2D()(x)
    x = layers.Flatten()(layers.AveragePooling2D(4)(x))
    x = norm(layers.Dense(16, activation="relu", use_bias=False)(x))
    return layers.Concatenate()([x, y])


def upsampled(x):
    """A small feature pyramid: nearest and bilinear upsampling, a transposed convolution, cropping."""
    x = layers.LeakyReLU(negative_slope=0.1)(norm(layers.Conv2D(8, 3, 2, padding="same")(x)))
    y = layers.LeakyReLU(negative_slope=0.1)(norm(layers.Conv2D(12, 3, 2, padding="same")(x)))
    near = layers.UpSampling2D(2)(y)
    smooth = layers.UpSampling2D(2, interpolation="bilinear")(layers.Conv2D(8, 1)(y))
    learnt = layers.Conv2DTranspose(8, 3, 2, padding="same", activation="relu")(y)
    x = layers.Concatenate()([layers.Add()([x, smooth, learnt]), near])
    x = layers.Cropping2D(((1, 0), (0, 1)))(x)
    x = layers.PReLU(shared_axes=[1, 2], alpha_initializer=keras.initializers.RandomUniform(0.1, 0.4, seed=1))(x)
    return layers.GlobalAveragePooling2D()(layers.Conv2D(16, 3, activation="swish")(x))


def attention(x):
    """A vision transformer of one block: patches, layer normalization, attention over heads, GELU."""
    x = layers.Conv2D(16, 4, 4)(x)
    x = layers.Reshape((-1, 16))(x)
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 8)(y, y)])
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    y = layers.Dense(16)(gelu(layers.Dense(32)(y)))
    x = layers.LayerNormalization(epsilon=1e-6)(layers.Add()([x, y]))
    return layers.GlobalAveragePooling1D()(x)


def convnext(x):
    """Depthwise 7 x 7, layer normalization over channels, GELU by its tanh formula, a scale per channel."""
    x = layers.LayerNormalization(epsilon=1e-6)(layers.Conv2D(12, 4, 4)(x))
    y = layers.LayerNormalization(epsilon=1e-6)(layers.DepthwiseConv2D(7, padding="same")(x))
    y = layers.Dense(24)(y)
    y = layers.Dense(12)(layers.Lambda(lambda z: keras.ops.gelu(z, approximate=True))(y))
    x = layers.Add()([x, y])
    x = layers.GroupNormalization(4)(x)
    x = layers.Activation("mish")(layers.Conv2D(16, 2, 2)(x))
    return layers.LayerNormalization(epsilon=1e-6)(layers.GlobalAveragePooling2D()(x))


def fake_quantized(x):
    """Quantization-aware training's graph: activations through FakeQuant nodes; ONNX Runtime rounds the weights."""

    def rounded(x, low, high):
        return layers.Lambda(lambda z: tf.quantization.fake_quant_with_min_max_args(z, low, high))(x)

    x = rounded(x, 0.0, 1.0)
    for channels, stride in ((8, 2), (16, 2)):
        x = layers.Conv2D(channels, 3, stride, padding="same")(x)
        x = rounded(layers.ReLU(6.0)(x), 0.0, 6.0)
    return rounded(layers.GlobalAveragePooling2D()(x), 0.0, 6.0)


def classifier(body: Callable, size: int, softmax: bool) -> keras.Model:
    """The body with ten classes, its statistics and the spread of its scores set by random images."""
    keras.utils.set_random_seed(7)
    images = keras.Input((size, size, 3), name="images")
    head = layers.Dense(10)
    scores = head(body(images))
    plain = keras.Model(images, scores)
    for seed in range(3):
        plain(photos(64, size, seed), training=True)
    kernel, bias = head.get_weights()
    kernel *= 3 / plain(photos(256, size, 9)).numpy().std(0).mean()
    head.set_weights([kernel, bias])
    head.set_weights([kernel, bias - plain(photos(256, size, 9)).numpy().mean(0)])
    return keras.Model(images, layers.Softmax()(scores)) if softmax else plain


# Files ----------------------------------------------------------------------------------------------------------------


def from_keras(name: str, body: Callable, size: int, opset: int, *, softmax: bool = True, nchw: bool = False) -> None:
    model = classifier(body, size, softmax)
    signature = [tf.TensorSpec((None, size, size, 3), tf.float32, name="images")]
    made, _ = tf2onnx.convert.from_keras(
        model, signature, opset=opset, inputs_as_nchw=["images"] if nchw else None,
        output_path=str(HERE / f"tf2onnx-{name}.onnx"),
    )  # fmt: skip
    report(name, made)


def from_lite(name: str, body: Callable, size: int, opset: int, *, form: str, softmax: bool = True) -> None:
    """Through LiteRT: "float", "int8" between float ends, or "uint8" to its ends."""
    converter = tf.lite.TFLiteConverter.from_keras_model(classifier(body, size, softmax))
    if form != "float":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        seen = photos(100, size, 5)
        converter.representative_dataset = lambda: ([seen[place : place + 1]] for place in range(len(seen)))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    if form == "uint8":
        converter.inference_input_type = converter.inference_output_type = tf.uint8
    with tempfile.NamedTemporaryFile(suffix=".tflite") as file:
        file.write(converter.convert())
        file.flush()
        made, _ = tf2onnx.convert.from_tflite(file.name, opset=opset, output_path=str(HERE / f"tf2onnx-{name}.onnx"))
    report(name, made)


def report(name: str, made) -> None:
    kinds: dict[str, int] = {}
    for node in made.graph.node:
        kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    print(name, made.ByteSize(), {entry.domain: entry.version for entry in made.opset_import}, kinds, flush=True)


FILES: dict[str, Callable[[str], None]] = {
    "mobilenet-9": lambda name: from_keras(name, mobilenet, 32, 9),
    "squeeze-11": lambda name: from_keras(name, squeeze, 32, 11),
    "pools-15": lambda name: from_keras(name, pools, 32, 15, softmax=False),
    "upsampled-nchw-17": lambda name: from_keras(name, upsampled, 16, 17, nchw=True),
    "attention-17": lambda name: from_keras(name, attention, 16, 17),
    "convnext-15": lambda name: from_keras(name, convnext, 32, 15),
    "qat-13": lambda name: from_keras(name, fake_quantized, 32, 13),
    "lite-int8-mobilenet-13": lambda name: from_lite(name, mobilenet, 32, 13, form="int8"),
    "lite-int8-squeeze-15": lambda name: from_lite(name, squeeze, 32, 15, form="int8"),
    "lite-int8-pools-13": lambda name: from_lite(name, pools, 32, 13, form="int8", softmax=False),
    "lite-uint8-upsampled-13": lambda name: from_lite(name, upsampled, 16, 13, form="uint8"),
}


def main(names: Sequence[str]) -> None:
    for name in names or FILES:
        FILES[name](name)


if __name__ == "__main__":
    main(sys.argv[1:])
