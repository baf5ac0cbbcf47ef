// What TensorFlow.js's wasm backend lacks for training: gradients of convolutions by the filter (of depthwise ones by the
// image, too). Its max pooling gives the gradient to the last of equal maxima, the other backends and gpulayers to the first.
// Known once tfjs-backend-wasm is imported and register(tf) is called.
function completeWasm(tf) {
  if (tf.getKernelsForBackend('wasm').length === 0 || tf.getKernel('Conv2DBackpropFilter', 'wasm')) return;

  const windows = (shape, filter, {strides, pad, dimRoundingMode}, depthwise) =>
    tf.backend_util.computeConv2DInfo(shape, filter, strides, 1, pad, dimRoundingMode, depthwise);
  const places = ({filterHeight, filterWidth}) =>
    Array.from({length: filterHeight * filterWidth}, (_, k) => [Math.floor(k / filterWidth), k % filterWidth]);
  const around = ({padInfo: {top, bottom, left, right}}) => [[0, 0], [top, bottom], [left, right], [0, 0]];

  // What lies under one place of the filter: [N, OH, OW, C] of the padded image.
  const under = (padded, g, [i, j]) => tf.stridedSlice(padded, [0, i, j, 0],
    [g.batchSize, i + (g.outHeight - 1) * g.strideHeight + 1, j + (g.outWidth - 1) * g.strideWidth + 1, g.inChannels],
    [1, g.strideHeight, g.strideWidth, 1]);

  // The sum of what each place of the filter gives back to the image: the opposite of under.
  function back(g, values) {
    const [, [top, bottom], [left, right]] = around(g);
    const {batchSize: n, outHeight, outWidth, strideHeight: s, strideWidth: t, inChannels: c} = g;
    const spread = ([i, j], v) => {
      const wide = tf.pad(tf.reshape(v, [n * outHeight, outWidth, 1, c]), [[0, 0], [0, 0], [0, t - 1], [0, 0]]);
      const high = tf.pad(tf.reshape(wide, [n, outHeight, 1, outWidth * t * c]), [[0, 0], [0, 0], [0, s - 1], [0, 0]]);
      const size = [n, (outHeight - 1) * s + 1, (outWidth - 1) * t + 1, c];
      const cut = tf.slice(tf.reshape(high, [n, outHeight * s, outWidth * t, c]), 0, size);
      const [below, beside] = [g.inHeight + top + bottom - i - size[1], g.inWidth + left + right - j - size[2]];
      return tf.pad(cut, [[0, 0], [i, below], [j, beside], [0, 0]]);
    };
    const sum = places(g).map((place, k) => spread(place, values[k])).reduce((a, b) => tf.add(a, b));
    return tf.slice(sum, [0, top, left, 0], [n, g.inHeight, g.inWidth, c]);
  }

  const kernels = {
    Conv2DBackpropFilter({x, dy}, attrs) {
      const g = windows(x.shape, attrs.filterShape, attrs, false);
      const padded = tf.pad(x, around(g)), columns = tf.reshape(dy, [-1, g.outChannels]);
      const each = places(g).map((at) => tf.matMul(tf.reshape(under(padded, g, at), [-1, g.inChannels]), columns, true));
      return tf.reshape(tf.stack(each), attrs.filterShape);
    },
    DepthwiseConv2dNativeBackpropFilter({x, dy}, attrs) {
      const g = windows(x.shape, attrs.filterShape, attrs, true);
      const padded = tf.pad(x, around(g)), split = tf.reshape(dy, [-1, ...attrs.filterShape.slice(2)]);
      const each = places(g).map((at) => tf.sum(tf.mul(tf.reshape(under(padded, g, at), [-1, g.inChannels, 1]), split), 0));
      return tf.reshape(tf.stack(each), attrs.filterShape);
    },
    DepthwiseConv2dNativeBackpropInput({dy, filter}, attrs) {
      const g = windows(attrs.inputShape, filter.shape, attrs, true);
      const [, , c, many] = filter.shape, split = tf.reshape(dy, [-1, c, many]);
      return back(g, places(g).map(([i, j]) => tf.sum(tf.mul(split, tf.reshape(tf.slice(filter, [i, j], [1, 1]), [1, c, many])), 2)));
    },
    MaxPoolGrad({dy, input, output}, {filterSize, strides, pad, dimRoundingMode}) {
      const g = tf.backend_util.computePool2DInfo(input.shape, filterSize, strides, 1, pad, dimRoundingMode);
      const padded = tf.pad(input, around(g), -Infinity);
      let free = tf.onesLike(dy);
      return back(g, places(g).map((at) => {
        const here = tf.mul(free, tf.cast(tf.equal(under(padded, g, at), output), 'float32'));
        free = tf.sub(free, here);
        return tf.mul(dy, here);
      }));
    },
  };
  tf.unregisterKernel('MaxPoolGrad', 'wasm');
  for (const [kernelName, f] of Object.entries(kernels)) {
    const kernelFunc = ({inputs, attrs}) => tf.tidy(() => f(inputs, attrs));
    tf.registerKernel({kernelName, backendName: 'wasm', kernelFunc});
  }
}
