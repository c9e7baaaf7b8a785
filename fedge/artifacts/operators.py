"""The operators a bundle may hold; everything else is refused before ONNX Runtime sees it.

Left out on purpose: operators that carry graphs (If, Loop, Scan, SequenceMap), work on strings,
decode images, or draw random numbers of their own; and every domain but ONNX's and the few
kernels of ``com.microsoft`` named here.
"""

from __future__ import annotations

ONNX, MICROSOFT = "", "com.microsoft"

_ELEMENTWISE = """
Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
Cast CastLike Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual
HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul
Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt
Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
"""
_SHAPE = """
CenterCropPad Col2Im Compress Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten
Gather GatherElements GatherND OneHot Pad Range Reshape Resize ReverseSequence ScatterElements
ScatterND Shape Size Slice SpaceToDepth Split Squeeze TensorScatter Tile Transpose Trilu Unsqueeze
"""
_REDUCE = """
ArgMax ArgMin CumSum Det Hardmax LogSoftmax LpNormalization NonZero ReduceL1 ReduceL2 ReduceLogSum
ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Softmax TopK
Unique
"""
_LAYERS = """
Attention AveragePool BatchNormalization Conv ConvTranspose Dropout Einsum GRU Gemm
GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization InstanceNormalization LRN LSTM
LayerNormalization LpPool MatMul MaxPool MaxUnpool MeanVarianceNormalization
NegativeLogLikelihoodLoss RMSNormalization RNN RotaryEmbedding SimplifiedLayerNormalization
SoftmaxCrossEntropyLoss
"""
_QUANTIZED = """
ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul
QuantizeLinear
"""
_MICROSOFT = """
BiasGelu FastGelu FusedConv FusedGemm FusedMatMul Gelu QuickGelu
"""
_TRAINING_ONNX = """
AveragePoolGrad MaxPoolGrad SequenceAt SequenceConstruct
"""
_TRAINING_MICROSOFT = """
AdamWOptimizer BatchNormInternal BatchNormalizationGrad BroadcastGradientArgs ConcatTraining
ConvGrad DivGrad DropoutGrad FakeQuant FakeQuantGrad FastGeluGrad GRUGrad GRUTraining
GatherElementsGrad GatherGrad GatherNDGrad GeluGrad InPlaceAccumulatorV2 InplaceClipGradNorm
LSTMGrad LSTMTraining LayerNormalizationGrad LeakyReluGrad LogSoftmaxGrad_13 PadGrad QuickGeluGrad
ReduceAllL2 ReluGrad SGDOptimizerV2 Scale SigmoidGrad SimplifiedLayerNormalizationGrad SliceGrad
SoftmaxCrossEntropyLossGrad SoftmaxCrossEntropyLossInternal SoftmaxCrossEntropyLossInternalGrad
SoftmaxGrad_13 SplitTraining TanhGrad
"""


def _allow(domain: str, *groups: str) -> frozenset[tuple[str, str]]:
    return frozenset((domain, name) for group in groups for name in group.split())


STANDARD = _allow(ONNX, _ELEMENTWISE, _SHAPE, _REDUCE, _LAYERS, _QUANTIZED) | _allow(
    MICROSOFT, _MICROSOFT
)
ORT_TRAINING = STANDARD | _allow(ONNX, _TRAINING_ONNX) | _allow(MICROSOFT, _TRAINING_MICROSOFT)
BY_KIND = {"standard": STANDARD, "ort-training": ORT_TRAINING}
