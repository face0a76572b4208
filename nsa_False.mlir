module @jit_step attributes {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32} {
  func.func public @main(%arg0: tensor<2x512x2x64xbf16>, %arg1: tensor<2x512x2x64xbf16>, %arg2: tensor<2x31x2x64xbf16>, %arg3: tensor<2x31x2x64xbf16>, %arg4: tensor<2x512x2x64xbf16>, %arg5: tensor<2x512x2x64xbf16>, %arg6: tensor<2x32x2x64xbf16>, %arg7: tensor<2x32x2x64xbf16>, %arg8: tensor<2xi32>, %arg9: tensor<2xi32>, %arg10: tensor<2x128xbf16>, %arg11: tensor<2x64xbf16>, %arg12: tensor<2x32x64xbf16>, %arg13: tensor<2x2048x128xbf16>, %arg14: tensor<2x128x64xbf16>, %arg15: tensor<2x128xbf16>, %arg16: tensor<2x64xbf16>, %arg17: tensor<2x32x64xbf16>, %arg18: tensor<2x2048x128xbf16>, %arg19: tensor<2x128x64xbf16>, %arg20: tensor<256x8x3xbf16>, %arg21: tensor<256x2x64xbf16>, %arg22: tensor<256x2x64xbf16>, %arg23: tensor<256x2x64xbf16>, %arg24: tensor<8x64x256xbf16>, %arg25: tensor<256x8x64xbf16>, %arg26: tensor<256x2x64xbf16>, %arg27: tensor<256x2x64xbf16>, %arg28: tensor<256x2x64xbf16>, %arg29: tensor<2x1x256xbf16>) -> (tensor<2x1x256xbf16> {jax.result_info = "result[0]"}, tensor<2x512x2x64xbf16> {jax.result_info = "result[1]['cache']['kv'].selected.key"}, tensor<2x512x2x64xbf16> {jax.result_info = "result[1]['cache']['kv'].selected.value"}, tensor<2x31x2x64xbf16> {jax.result_info = "result[1]['cache']['kv'].compressed.key"}, tensor<2x31x2x64xbf16> {jax.result_info = "result[1]['cache']['kv'].compressed.value"}, tensor<2x512x2x64xbf16> {jax.result_info = "result[1]['cache']['kv'].window.key"}, tensor<2x512x2x64xbf16> {jax.result_info = "result[1]['cache']['kv'].window.value"}, tensor<2x32x2x64xbf16> {jax.result_info = "result[1]['cache']['kv'].tail.key"}, tensor<2x32x2x64xbf16> {jax.result_info = "result[1]['cache']['kv'].tail.value"}, tensor<2xi32> {jax.result_info = "result[1]['cache']['kv'].lengths"}, tensor<2xi32> {jax.result_info = "result[1]['cache']['kv'].earliest"}) {
    %cst = stablehlo.constant dense<[1.000000e+00, 0.749894201, 0.562341332, 0.421696514, 0.316227764, 0.237137377, 0.177827939, 0.133352146, 1.000000e-01, 0.0749894232, 0.0562341325, 0.0421696492, 0.0316227749, 0.0237137377, 0.0177827943, 0.013335214, 0.00999999977, 0.00749894232, 0.00562341325, 0.00421696482, 0.00316227763, 0.00237137382, 0.00177827943, 0.00133352145, 1.000000e-03, 7.49894185E-4, 5.62341302E-4, 4.21696517E-4, 3.16227757E-4, 2.3713737E-4, 1.7782794E-4, 1.3335215E-4]> : tensor<32xf32>
    %cst_0 = stablehlo.constant dense<[1.000000e+00, 0.749894201, 0.562341332, 0.421696514, 0.316227764, 0.237137377, 0.177827939, 0.133352146, 1.000000e-01, 0.0749894232, 0.0562341325, 0.0421696492, 0.0316227749, 0.0237137377, 0.0177827943, 0.013335214, 0.00999999977, 0.00749894232, 0.00562341325, 0.00421696482, 0.00316227763, 0.00237137382, 0.00177827943, 0.00133352145, 1.000000e-03, 7.49894185E-4, 5.62341302E-4, 4.21696517E-4, 3.16227757E-4, 2.3713737E-4, 1.7782794E-4, 1.3335215E-4]> : tensor<32xf32>
    %cst_1 = stablehlo.constant dense<[1.000000e+00, 0.749894201, 0.562341332, 0.421696514, 0.316227764, 0.237137377, 0.177827939, 0.133352146, 1.000000e-01, 0.0749894232, 0.0562341325, 0.0421696492, 0.0316227749, 0.0237137377, 0.0177827943, 0.013335214, 0.00999999977, 0.00749894232, 0.00562341325, 0.00421696482, 0.00316227763, 0.00237137382, 0.00177827943, 0.00133352145, 1.000000e-03, 7.49894185E-4, 5.62341302E-4, 4.21696517E-4, 3.16227757E-4, 2.3713737E-4, 1.7782794E-4, 1.3335215E-4]> : tensor<32xf32>
    %cst_2 = stablehlo.constant dense<[1.000000e+00, 0.749894201, 0.562341332, 0.421696514, 0.316227764, 0.237137377, 0.177827939, 0.133352146, 1.000000e-01, 0.0749894232, 0.0562341325, 0.0421696492, 0.0316227749, 0.0237137377, 0.0177827943, 0.013335214, 0.00999999977, 0.00749894232, 0.00562341325, 0.00421696482, 0.00316227763, 0.00237137382, 0.00177827943, 0.00133352145, 1.000000e-03, 7.49894185E-4, 5.62341302E-4, 4.21696517E-4, 3.16227757E-4, 2.3713737E-4, 1.7782794E-4, 1.3335215E-4]> : tensor<32xf32>
    %c = stablehlo.constant dense<1> : tensor<i32>
    %0 = stablehlo.broadcast_in_dim %c, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %1 = stablehlo.broadcast_in_dim %arg8, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %2 = stablehlo.iota dim = 0 : tensor<1xi32>
    %3 = stablehlo.broadcast_in_dim %2, dims = [1] : (tensor<1xi32>) -> tensor<1x1xi32>
    %4 = stablehlo.broadcast_in_dim %3, dims = [0, 1] : (tensor<1x1xi32>) -> tensor<2x1xi32>
    %5 = stablehlo.add %1, %4 : tensor<2x1xi32>
    %6 = stablehlo.dot_general %arg29, %arg25, contracting_dims = [2] x [0], precision = [DEFAULT, DEFAULT] : (tensor<2x1x256xbf16>, tensor<256x8x64xbf16>) -> tensor<2x1x8x64xbf16>
    %7 = stablehlo.dot_general %arg29, %arg20, contracting_dims = [2] x [0], precision = [DEFAULT, DEFAULT] : (tensor<2x1x256xbf16>, tensor<256x8x3xbf16>) -> tensor<2x1x8x3xbf16>
    %8 = stablehlo.convert %7 : (tensor<2x1x8x3xbf16>) -> tensor<2x1x8x3xf32>
    %9 = stablehlo.negate %8 : tensor<2x1x8x3xf32>
    %10 = stablehlo.exponential %9 : tensor<2x1x8x3xf32>
    %cst_3 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %11 = stablehlo.broadcast_in_dim %cst_3, dims = [] : (tensor<f32>) -> tensor<2x1x8x3xf32>
    %12 = stablehlo.add %11, %10 : tensor<2x1x8x3xf32>
    %cst_4 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %13 = stablehlo.broadcast_in_dim %cst_4, dims = [] : (tensor<f32>) -> tensor<2x1x8x3xf32>
    %14 = stablehlo.divide %13, %12 : tensor<2x1x8x3xf32>
    %15 = stablehlo.dot_general %arg29, %arg21, contracting_dims = [2] x [0], precision = [DEFAULT, DEFAULT] : (tensor<2x1x256xbf16>, tensor<256x2x64xbf16>) -> tensor<2x1x2x64xbf16>
    %16 = stablehlo.dot_general %arg29, %arg22, contracting_dims = [2] x [0], precision = [DEFAULT, DEFAULT] : (tensor<2x1x256xbf16>, tensor<256x2x64xbf16>) -> tensor<2x1x2x64xbf16>
    %17 = stablehlo.dot_general %arg29, %arg23, contracting_dims = [2] x [0], precision = [DEFAULT, DEFAULT] : (tensor<2x1x256xbf16>, tensor<256x2x64xbf16>) -> tensor<2x1x2x64xbf16>
    %18 = stablehlo.dot_general %arg29, %arg26, contracting_dims = [2] x [0], precision = [DEFAULT, DEFAULT] : (tensor<2x1x256xbf16>, tensor<256x2x64xbf16>) -> tensor<2x1x2x64xbf16>
    %19 = stablehlo.dot_general %arg29, %arg27, contracting_dims = [2] x [0], precision = [DEFAULT, DEFAULT] : (tensor<2x1x256xbf16>, tensor<256x2x64xbf16>) -> tensor<2x1x2x64xbf16>
    %20 = stablehlo.dot_general %arg29, %arg28, contracting_dims = [2] x [0], precision = [DEFAULT, DEFAULT] : (tensor<2x1x256xbf16>, tensor<256x2x64xbf16>) -> tensor<2x1x2x64xbf16>
    %21 = stablehlo.broadcast_in_dim %cst, dims = [3] : (tensor<32xf32>) -> tensor<1x1x1x32xf32>
    %22 = stablehlo.broadcast_in_dim %5, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1x1xi32>
    %23 = stablehlo.convert %22 : (tensor<2x1x1x1xi32>) -> tensor<2x1x1x1xf32>
    %24 = stablehlo.broadcast_in_dim %23, dims = [0, 1, 2, 3] : (tensor<2x1x1x1xf32>) -> tensor<2x1x1x32xf32>
    %25 = stablehlo.broadcast_in_dim %21, dims = [0, 1, 2, 3] : (tensor<1x1x1x32xf32>) -> tensor<2x1x1x32xf32>
    %26 = stablehlo.multiply %24, %25 : tensor<2x1x1x32xf32>
    %27 = stablehlo.cosine %26 : tensor<2x1x1x32xf32>
    %cst_5 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %28 = stablehlo.broadcast_in_dim %cst_5, dims = [] : (tensor<f32>) -> tensor<2x1x1x32xf32>
    %29 = stablehlo.multiply %27, %28 : tensor<2x1x1x32xf32>
    %30 = stablehlo.sine %26 : tensor<2x1x1x32xf32>
    %cst_6 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %31 = stablehlo.broadcast_in_dim %cst_6, dims = [] : (tensor<f32>) -> tensor<2x1x1x32xf32>
    %32 = stablehlo.multiply %30, %31 : tensor<2x1x1x32xf32>
    %33 = stablehlo.convert %6 : (tensor<2x1x8x64xbf16>) -> tensor<2x1x8x64xf32>
    %34 = stablehlo.slice %33 [0:2, 0:1, 0:8, 0:32] : (tensor<2x1x8x64xf32>) -> tensor<2x1x8x32xf32>
    %35 = stablehlo.slice %33 [0:2, 0:1, 0:8, 32:64] : (tensor<2x1x8x64xf32>) -> tensor<2x1x8x32xf32>
    %36 = stablehlo.broadcast_in_dim %29, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x8x32xf32>
    %37 = stablehlo.multiply %34, %36 : tensor<2x1x8x32xf32>
    %38 = stablehlo.broadcast_in_dim %32, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x8x32xf32>
    %39 = stablehlo.multiply %35, %38 : tensor<2x1x8x32xf32>
    %40 = stablehlo.subtract %37, %39 : tensor<2x1x8x32xf32>
    %41 = stablehlo.broadcast_in_dim %29, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x8x32xf32>
    %42 = stablehlo.multiply %35, %41 : tensor<2x1x8x32xf32>
    %43 = stablehlo.broadcast_in_dim %32, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x8x32xf32>
    %44 = stablehlo.multiply %34, %43 : tensor<2x1x8x32xf32>
    %45 = stablehlo.add %42, %44 : tensor<2x1x8x32xf32>
    %46 = stablehlo.concatenate %40, %45, dim = 3 : (tensor<2x1x8x32xf32>, tensor<2x1x8x32xf32>) -> tensor<2x1x8x64xf32>
    %47 = stablehlo.convert %46 : (tensor<2x1x8x64xf32>) -> tensor<2x1x8x64xbf16>
    %48 = stablehlo.broadcast_in_dim %cst_0, dims = [3] : (tensor<32xf32>) -> tensor<1x1x1x32xf32>
    %49 = stablehlo.broadcast_in_dim %5, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1x1xi32>
    %50 = stablehlo.convert %49 : (tensor<2x1x1x1xi32>) -> tensor<2x1x1x1xf32>
    %51 = stablehlo.broadcast_in_dim %50, dims = [0, 1, 2, 3] : (tensor<2x1x1x1xf32>) -> tensor<2x1x1x32xf32>
    %52 = stablehlo.broadcast_in_dim %48, dims = [0, 1, 2, 3] : (tensor<1x1x1x32xf32>) -> tensor<2x1x1x32xf32>
    %53 = stablehlo.multiply %51, %52 : tensor<2x1x1x32xf32>
    %54 = stablehlo.cosine %53 : tensor<2x1x1x32xf32>
    %cst_7 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %55 = stablehlo.broadcast_in_dim %cst_7, dims = [] : (tensor<f32>) -> tensor<2x1x1x32xf32>
    %56 = stablehlo.multiply %54, %55 : tensor<2x1x1x32xf32>
    %57 = stablehlo.sine %53 : tensor<2x1x1x32xf32>
    %cst_8 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %58 = stablehlo.broadcast_in_dim %cst_8, dims = [] : (tensor<f32>) -> tensor<2x1x1x32xf32>
    %59 = stablehlo.multiply %57, %58 : tensor<2x1x1x32xf32>
    %60 = stablehlo.convert %16 : (tensor<2x1x2x64xbf16>) -> tensor<2x1x2x64xf32>
    %61 = stablehlo.slice %60 [0:2, 0:1, 0:2, 0:32] : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x32xf32>
    %62 = stablehlo.slice %60 [0:2, 0:1, 0:2, 32:64] : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x32xf32>
    %63 = stablehlo.broadcast_in_dim %56, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %64 = stablehlo.multiply %61, %63 : tensor<2x1x2x32xf32>
    %65 = stablehlo.broadcast_in_dim %59, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %66 = stablehlo.multiply %62, %65 : tensor<2x1x2x32xf32>
    %67 = stablehlo.subtract %64, %66 : tensor<2x1x2x32xf32>
    %68 = stablehlo.broadcast_in_dim %56, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %69 = stablehlo.multiply %62, %68 : tensor<2x1x2x32xf32>
    %70 = stablehlo.broadcast_in_dim %59, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %71 = stablehlo.multiply %61, %70 : tensor<2x1x2x32xf32>
    %72 = stablehlo.add %69, %71 : tensor<2x1x2x32xf32>
    %73 = stablehlo.concatenate %67, %72, dim = 3 : (tensor<2x1x2x32xf32>, tensor<2x1x2x32xf32>) -> tensor<2x1x2x64xf32>
    %74 = stablehlo.convert %73 : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x64xbf16>
    %75 = stablehlo.broadcast_in_dim %cst_1, dims = [3] : (tensor<32xf32>) -> tensor<1x1x1x32xf32>
    %76 = stablehlo.broadcast_in_dim %5, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1x1xi32>
    %77 = stablehlo.convert %76 : (tensor<2x1x1x1xi32>) -> tensor<2x1x1x1xf32>
    %78 = stablehlo.broadcast_in_dim %77, dims = [0, 1, 2, 3] : (tensor<2x1x1x1xf32>) -> tensor<2x1x1x32xf32>
    %79 = stablehlo.broadcast_in_dim %75, dims = [0, 1, 2, 3] : (tensor<1x1x1x32xf32>) -> tensor<2x1x1x32xf32>
    %80 = stablehlo.multiply %78, %79 : tensor<2x1x1x32xf32>
    %81 = stablehlo.cosine %80 : tensor<2x1x1x32xf32>
    %cst_9 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %82 = stablehlo.broadcast_in_dim %cst_9, dims = [] : (tensor<f32>) -> tensor<2x1x1x32xf32>
    %83 = stablehlo.multiply %81, %82 : tensor<2x1x1x32xf32>
    %84 = stablehlo.sine %80 : tensor<2x1x1x32xf32>
    %cst_10 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %85 = stablehlo.broadcast_in_dim %cst_10, dims = [] : (tensor<f32>) -> tensor<2x1x1x32xf32>
    %86 = stablehlo.multiply %84, %85 : tensor<2x1x1x32xf32>
    %87 = stablehlo.convert %17 : (tensor<2x1x2x64xbf16>) -> tensor<2x1x2x64xf32>
    %88 = stablehlo.slice %87 [0:2, 0:1, 0:2, 0:32] : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x32xf32>
    %89 = stablehlo.slice %87 [0:2, 0:1, 0:2, 32:64] : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x32xf32>
    %90 = stablehlo.broadcast_in_dim %83, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %91 = stablehlo.multiply %88, %90 : tensor<2x1x2x32xf32>
    %92 = stablehlo.broadcast_in_dim %86, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %93 = stablehlo.multiply %89, %92 : tensor<2x1x2x32xf32>
    %94 = stablehlo.subtract %91, %93 : tensor<2x1x2x32xf32>
    %95 = stablehlo.broadcast_in_dim %83, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %96 = stablehlo.multiply %89, %95 : tensor<2x1x2x32xf32>
    %97 = stablehlo.broadcast_in_dim %86, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %98 = stablehlo.multiply %88, %97 : tensor<2x1x2x32xf32>
    %99 = stablehlo.add %96, %98 : tensor<2x1x2x32xf32>
    %100 = stablehlo.concatenate %94, %99, dim = 3 : (tensor<2x1x2x32xf32>, tensor<2x1x2x32xf32>) -> tensor<2x1x2x64xf32>
    %101 = stablehlo.convert %100 : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x64xbf16>
    %102 = stablehlo.subtract %5, %5 : tensor<2x1xi32>
    %103 = stablehlo.compare EQ, %arg8, %arg8, SIGNED : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %c_11 = stablehlo.constant dense<0> : tensor<i32>
    %104 = call @_where(%103, %0, %c_11) : (tensor<2xi1>, tensor<2xi32>, tensor<i32>) -> tensor<2xi32>
    %c_12 = stablehlo.constant dense<1> : tensor<i32>
    %c_13 = stablehlo.constant dense<0> : tensor<i32>
    %105 = call @clip(%104, %c_12, %c_13) : (tensor<2xi32>, tensor<i32>, tensor<i32>) -> tensor<2xi32>
    %106 = stablehlo.add %arg8, %105 : tensor<2xi32>
    %c_14 = stablehlo.constant dense<512> : tensor<i32>
    %107 = stablehlo.broadcast_in_dim %c_14, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %108 = stablehlo.minimum %106, %107 : tensor<2xi32>
    %109 = stablehlo.broadcast_in_dim %arg8, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %110 = stablehlo.iota dim = 0 : tensor<1xi32>
    %111 = stablehlo.broadcast_in_dim %110, dims = [1] : (tensor<1xi32>) -> tensor<1x1xi32>
    %112 = stablehlo.broadcast_in_dim %111, dims = [0, 1] : (tensor<1x1xi32>) -> tensor<2x1xi32>
    %113 = stablehlo.add %109, %112 : tensor<2x1xi32>
    %114 = stablehlo.broadcast_in_dim %108, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %115 = stablehlo.compare LT, %113, %114, SIGNED : (tensor<2x1xi32>, tensor<2x1xi32>) -> tensor<2x1xi1>
    %116 = stablehlo.iota dim = 0 : tensor<1xi32>
    %c_15 = stablehlo.constant dense<512> : tensor<i32>
    %117 = stablehlo.broadcast_in_dim %c_15, dims = [] : (tensor<i32>) -> tensor<1xi32>
    %118 = stablehlo.add %117, %116 : tensor<1xi32>
    %119 = call @_where_0(%115, %113, %118) : (tensor<2x1xi1>, tensor<2x1xi32>, tensor<1xi32>) -> tensor<2x1xi32>
    %120 = stablehlo.iota dim = 0 : tensor<2xi32>
    %121 = stablehlo.broadcast_in_dim %120, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %122 = stablehlo.broadcast_in_dim %121, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %123 = stablehlo.broadcast_in_dim %119, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %124 = stablehlo.concatenate %122, %123, dim = 2 : (tensor<2x1x1xi32>, tensor<2x1x1xi32>) -> tensor<2x1x2xi32>
    %125 = "stablehlo.scatter"(%arg0, %124, %74) <{indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [2, 3], inserted_window_dims = [0, 1], scatter_dims_to_operand_dims = [0, 1], index_vector_dim = 2>, unique_indices = true}> ({
    ^bb0(%arg30: tensor<bf16>, %arg31: tensor<bf16>):
      stablehlo.return %arg31 : tensor<bf16>
    }) : (tensor<2x512x2x64xbf16>, tensor<2x1x2xi32>, tensor<2x1x2x64xbf16>) -> tensor<2x512x2x64xbf16>
    %126 = stablehlo.broadcast_in_dim %121, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %127 = stablehlo.broadcast_in_dim %119, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %128 = stablehlo.concatenate %126, %127, dim = 2 : (tensor<2x1x1xi32>, tensor<2x1x1xi32>) -> tensor<2x1x2xi32>
    %129 = "stablehlo.scatter"(%arg1, %128, %19) <{indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [2, 3], inserted_window_dims = [0, 1], scatter_dims_to_operand_dims = [0, 1], index_vector_dim = 2>, unique_indices = true}> ({
    ^bb0(%arg30: tensor<bf16>, %arg31: tensor<bf16>):
      stablehlo.return %arg31 : tensor<bf16>
    }) : (tensor<2x512x2x64xbf16>, tensor<2x1x2xi32>, tensor<2x1x2x64xbf16>) -> tensor<2x512x2x64xbf16>
    %130 = stablehlo.broadcast_in_dim %arg8, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %131 = stablehlo.iota dim = 0 : tensor<1xi32>
    %132 = stablehlo.broadcast_in_dim %131, dims = [1] : (tensor<1xi32>) -> tensor<1x1xi32>
    %133 = stablehlo.broadcast_in_dim %132, dims = [0, 1] : (tensor<1x1xi32>) -> tensor<2x1xi32>
    %134 = stablehlo.add %130, %133 : tensor<2x1xi32>
    %c_16 = stablehlo.constant dense<512> : tensor<i32>
    %135 = call @remainder(%134, %c_16) : (tensor<2x1xi32>, tensor<i32>) -> tensor<2x1xi32>
    %136 = stablehlo.broadcast_in_dim %108, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %137 = stablehlo.compare LT, %134, %136, SIGNED : (tensor<2x1xi32>, tensor<2x1xi32>) -> tensor<2x1xi1>
    %138 = stablehlo.iota dim = 0 : tensor<1xi32>
    %c_17 = stablehlo.constant dense<512> : tensor<i32>
    %139 = stablehlo.broadcast_in_dim %c_17, dims = [] : (tensor<i32>) -> tensor<1xi32>
    %140 = stablehlo.add %139, %138 : tensor<1xi32>
    %141 = call @_where_0(%137, %135, %140) : (tensor<2x1xi1>, tensor<2x1xi32>, tensor<1xi32>) -> tensor<2x1xi32>
    %142 = stablehlo.iota dim = 0 : tensor<2xi32>
    %143 = stablehlo.broadcast_in_dim %142, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %144 = stablehlo.broadcast_in_dim %143, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %145 = stablehlo.broadcast_in_dim %141, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %146 = stablehlo.concatenate %144, %145, dim = 2 : (tensor<2x1x1xi32>, tensor<2x1x1xi32>) -> tensor<2x1x2xi32>
    %147 = "stablehlo.scatter"(%arg4, %146, %101) <{indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [2, 3], inserted_window_dims = [0, 1], scatter_dims_to_operand_dims = [0, 1], index_vector_dim = 2>, unique_indices = true}> ({
    ^bb0(%arg30: tensor<bf16>, %arg31: tensor<bf16>):
      stablehlo.return %arg31 : tensor<bf16>
    }) : (tensor<2x512x2x64xbf16>, tensor<2x1x2xi32>, tensor<2x1x2x64xbf16>) -> tensor<2x512x2x64xbf16>
    %148 = stablehlo.broadcast_in_dim %143, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %149 = stablehlo.broadcast_in_dim %141, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %150 = stablehlo.concatenate %148, %149, dim = 2 : (tensor<2x1x1xi32>, tensor<2x1x1xi32>) -> tensor<2x1x2xi32>
    %151 = "stablehlo.scatter"(%arg5, %150, %20) <{indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [2, 3], inserted_window_dims = [0, 1], scatter_dims_to_operand_dims = [0, 1], index_vector_dim = 2>, unique_indices = true}> ({
    ^bb0(%arg30: tensor<bf16>, %arg31: tensor<bf16>):
      stablehlo.return %arg31 : tensor<bf16>
    }) : (tensor<2x512x2x64xbf16>, tensor<2x1x2xi32>, tensor<2x1x2x64xbf16>) -> tensor<2x512x2x64xbf16>
    %c_18 = stablehlo.constant dense<32> : tensor<i32>
    %152 = stablehlo.broadcast_in_dim %c_18, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %153 = stablehlo.subtract %arg8, %152 : tensor<2xi32>
    %c_19 = stablehlo.constant dense<16> : tensor<i32>
    %154 = call @floor_divide(%153, %c_19) : (tensor<2xi32>, tensor<i32>) -> tensor<2xi32>
    %c_20 = stablehlo.constant dense<1> : tensor<i32>
    %155 = stablehlo.broadcast_in_dim %c_20, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %156 = stablehlo.add %154, %155 : tensor<2xi32>
    %c_21 = stablehlo.constant dense<0> : tensor<i32>
    %157 = stablehlo.broadcast_in_dim %c_21, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %158 = stablehlo.maximum %156, %157 : tensor<2xi32>
    %159 = stablehlo.broadcast_in_dim %158, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %160 = stablehlo.iota dim = 0 : tensor<1xi32>
    %161 = stablehlo.broadcast_in_dim %160, dims = [1] : (tensor<1xi32>) -> tensor<1x1xi32>
    %162 = stablehlo.broadcast_in_dim %161, dims = [0, 1] : (tensor<1x1xi32>) -> tensor<2x1xi32>
    %163 = stablehlo.add %159, %162 : tensor<2x1xi32>
    %c_22 = stablehlo.constant dense<31> : tensor<i32>
    %164 = stablehlo.broadcast_in_dim %c_22, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %165 = stablehlo.subtract %arg8, %164 : tensor<2xi32>
    %166 = stablehlo.broadcast_in_dim %165, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %167 = stablehlo.iota dim = 0 : tensor<31xi32>
    %168 = stablehlo.broadcast_in_dim %167, dims = [1] : (tensor<31xi32>) -> tensor<1x31xi32>
    %169 = stablehlo.broadcast_in_dim %166, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x31xi32>
    %170 = stablehlo.broadcast_in_dim %168, dims = [0, 1] : (tensor<1x31xi32>) -> tensor<2x31xi32>
    %171 = stablehlo.add %169, %170 : tensor<2x31xi32>
    %c_23 = stablehlo.constant dense<32> : tensor<i32>
    %172 = call @remainder_3(%171, %c_23) : (tensor<2x31xi32>, tensor<i32>) -> tensor<2x31xi32>
    %173 = stablehlo.iota dim = 0 : tensor<2xi32>
    %174 = stablehlo.broadcast_in_dim %173, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %175 = stablehlo.broadcast_in_dim %174, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x31xi32>
    %176 = stablehlo.broadcast_in_dim %175, dims = [0, 1] : (tensor<2x31xi32>) -> tensor<2x31x1xi32>
    %177 = stablehlo.broadcast_in_dim %172, dims = [0, 1] : (tensor<2x31xi32>) -> tensor<2x31x1xi32>
    %178 = stablehlo.concatenate %176, %177, dim = 2 : (tensor<2x31x1xi32>, tensor<2x31x1xi32>) -> tensor<2x31x2xi32>
    %179 = "stablehlo.gather"(%arg6, %178) <{dimension_numbers = #stablehlo.gather<offset_dims = [2, 3], collapsed_slice_dims = [0, 1], start_index_map = [0, 1], index_vector_dim = 2>, indices_are_sorted = false, slice_sizes = array<i64: 1, 1, 2, 64>}> : (tensor<2x32x2x64xbf16>, tensor<2x31x2xi32>) -> tensor<2x31x2x64xbf16>
    %180 = stablehlo.broadcast_in_dim %174, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x31xi32>
    %181 = stablehlo.broadcast_in_dim %180, dims = [0, 1] : (tensor<2x31xi32>) -> tensor<2x31x1xi32>
    %182 = stablehlo.broadcast_in_dim %172, dims = [0, 1] : (tensor<2x31xi32>) -> tensor<2x31x1xi32>
    %183 = stablehlo.concatenate %181, %182, dim = 2 : (tensor<2x31x1xi32>, tensor<2x31x1xi32>) -> tensor<2x31x2xi32>
    %184 = "stablehlo.gather"(%arg7, %183) <{dimension_numbers = #stablehlo.gather<offset_dims = [2, 3], collapsed_slice_dims = [0, 1], start_index_map = [0, 1], index_vector_dim = 2>, indices_are_sorted = false, slice_sizes = array<i64: 1, 1, 2, 64>}> : (tensor<2x32x2x64xbf16>, tensor<2x31x2xi32>) -> tensor<2x31x2x64xbf16>
    %185 = stablehlo.concatenate %179, %15, dim = 1 : (tensor<2x31x2x64xbf16>, tensor<2x1x2x64xbf16>) -> tensor<2x32x2x64xbf16>
    %186 = stablehlo.concatenate %184, %18, dim = 1 : (tensor<2x31x2x64xbf16>, tensor<2x1x2x64xbf16>) -> tensor<2x32x2x64xbf16>
    %c_24 = stablehlo.constant dense<16> : tensor<i32>
    %187 = stablehlo.broadcast_in_dim %c_24, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %188 = stablehlo.multiply %158, %187 : tensor<2xi32>
    %189 = stablehlo.subtract %188, %arg8 : tensor<2xi32>
    %c_25 = stablehlo.constant dense<32> : tensor<i32>
    %190 = stablehlo.broadcast_in_dim %c_25, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %191 = stablehlo.add %189, %190 : tensor<2xi32>
    %c_26 = stablehlo.constant dense<1> : tensor<i32>
    %192 = stablehlo.broadcast_in_dim %c_26, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %193 = stablehlo.subtract %191, %192 : tensor<2xi32>
    %194 = stablehlo.broadcast_in_dim %193, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %195 = stablehlo.iota dim = 0 : tensor<32xi32>
    %196 = stablehlo.broadcast_in_dim %195, dims = [1] : (tensor<32xi32>) -> tensor<1x32xi32>
    %197 = stablehlo.broadcast_in_dim %194, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x32xi32>
    %198 = stablehlo.broadcast_in_dim %196, dims = [0, 1] : (tensor<1x32xi32>) -> tensor<2x32xi32>
    %199 = stablehlo.add %197, %198 : tensor<2x32xi32>
    %200 = stablehlo.iota dim = 0 : tensor<2xi32>
    %201 = stablehlo.broadcast_in_dim %200, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %202 = stablehlo.broadcast_in_dim %201, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x32xi32>
    %203 = stablehlo.broadcast_in_dim %202, dims = [0, 1] : (tensor<2x32xi32>) -> tensor<2x32x1xi32>
    %204 = stablehlo.broadcast_in_dim %199, dims = [0, 1] : (tensor<2x32xi32>) -> tensor<2x32x1xi32>
    %205 = stablehlo.concatenate %203, %204, dim = 2 : (tensor<2x32x1xi32>, tensor<2x32x1xi32>) -> tensor<2x32x2xi32>
    %206 = "stablehlo.gather"(%185, %205) <{dimension_numbers = #stablehlo.gather<offset_dims = [2, 3], collapsed_slice_dims = [0, 1], start_index_map = [0, 1], index_vector_dim = 2>, indices_are_sorted = false, slice_sizes = array<i64: 1, 1, 2, 64>}> : (tensor<2x32x2x64xbf16>, tensor<2x32x2xi32>) -> tensor<2x32x2x64xbf16>
    %207 = stablehlo.broadcast_in_dim %201, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x32xi32>
    %208 = stablehlo.broadcast_in_dim %207, dims = [0, 1] : (tensor<2x32xi32>) -> tensor<2x32x1xi32>
    %209 = stablehlo.broadcast_in_dim %199, dims = [0, 1] : (tensor<2x32xi32>) -> tensor<2x32x1xi32>
    %210 = stablehlo.concatenate %208, %209, dim = 2 : (tensor<2x32x1xi32>, tensor<2x32x1xi32>) -> tensor<2x32x2xi32>
    %211 = "stablehlo.gather"(%186, %210) <{dimension_numbers = #stablehlo.gather<offset_dims = [2, 3], collapsed_slice_dims = [0, 1], start_index_map = [0, 1], index_vector_dim = 2>, indices_are_sorted = false, slice_sizes = array<i64: 1, 1, 2, 64>}> : (tensor<2x32x2x64xbf16>, tensor<2x32x2xi32>) -> tensor<2x32x2x64xbf16>
    %c_27 = stablehlo.constant dense<16> : tensor<i32>
    %212 = stablehlo.broadcast_in_dim %c_27, dims = [] : (tensor<i32>) -> tensor<2x1xi32>
    %213 = stablehlo.multiply %163, %212 : tensor<2x1xi32>
    %214 = stablehlo.add %213, %102 : tensor<2x1xi32>
    %215 = stablehlo.reshape %206 : (tensor<2x32x2x64xbf16>) -> tensor<2x2x16x2x64xbf16>
    %216 = stablehlo.slice %215 [0:2, 0:1, 0:16, 0:2, 0:64] : (tensor<2x2x16x2x64xbf16>) -> tensor<2x1x16x2x64xbf16>
    %217 = stablehlo.slice %215 [0:2, 1:2, 0:16, 0:2, 0:64] : (tensor<2x2x16x2x64xbf16>) -> tensor<2x1x16x2x64xbf16>
    %218 = stablehlo.concatenate %216, %217, dim = 2 : (tensor<2x1x16x2x64xbf16>, tensor<2x1x16x2x64xbf16>) -> tensor<2x1x32x2x64xbf16>
    %219 = stablehlo.reshape %arg13 : (tensor<2x2048x128xbf16>) -> tensor<2x32x64x128xbf16>
    %220 = stablehlo.dot_general %arg12, %219, batching_dims = [0] x [0], contracting_dims = [2, 1] x [2, 1], precision = [DEFAULT, DEFAULT] : (tensor<2x32x64xbf16>, tensor<2x32x64x128xbf16>) -> tensor<2x128xf32>
    %221 = stablehlo.dot_general %219, %218, batching_dims = [0] x [3], contracting_dims = [2, 1] x [4, 2], precision = [DEFAULT, DEFAULT] : (tensor<2x32x64x128xbf16>, tensor<2x1x32x2x64xbf16>) -> tensor<2x128x2x1xf32>
    %222 = stablehlo.transpose %221, dims = [2, 3, 0, 1] : (tensor<2x128x2x1xf32>) -> tensor<2x1x2x128xf32>
    %223 = stablehlo.broadcast_in_dim %220, dims = [2, 3] : (tensor<2x128xf32>) -> tensor<1x1x2x128xf32>
    %224 = stablehlo.broadcast_in_dim %223, dims = [0, 1, 2, 3] : (tensor<1x1x2x128xf32>) -> tensor<2x1x2x128xf32>
    %225 = stablehlo.add %222, %224 : tensor<2x1x2x128xf32>
    %226 = stablehlo.broadcast_in_dim %arg10, dims = [2, 3] : (tensor<2x128xbf16>) -> tensor<1x1x2x128xbf16>
    %227 = stablehlo.convert %226 : (tensor<1x1x2x128xbf16>) -> tensor<1x1x2x128xf32>
    %228 = stablehlo.broadcast_in_dim %227, dims = [0, 1, 2, 3] : (tensor<1x1x2x128xf32>) -> tensor<2x1x2x128xf32>
    %229 = stablehlo.add %225, %228 : tensor<2x1x2x128xf32>
    %230 = stablehlo.multiply %229, %229 : tensor<2x1x2x128xf32>
    %231 = stablehlo.multiply %230, %229 : tensor<2x1x2x128xf32>
    %cst_28 = stablehlo.constant dense<4.471500e-02> : tensor<f32>
    %232 = stablehlo.broadcast_in_dim %cst_28, dims = [] : (tensor<f32>) -> tensor<2x1x2x128xf32>
    %233 = stablehlo.multiply %232, %231 : tensor<2x1x2x128xf32>
    %234 = stablehlo.add %229, %233 : tensor<2x1x2x128xf32>
    %cst_29 = stablehlo.constant dense<0.797884583> : tensor<f32>
    %235 = stablehlo.broadcast_in_dim %cst_29, dims = [] : (tensor<f32>) -> tensor<2x1x2x128xf32>
    %236 = stablehlo.multiply %235, %234 : tensor<2x1x2x128xf32>
    %237 = stablehlo.tanh %236 : tensor<2x1x2x128xf32>
    %cst_30 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %238 = stablehlo.broadcast_in_dim %cst_30, dims = [] : (tensor<f32>) -> tensor<2x1x2x128xf32>
    %239 = stablehlo.add %238, %237 : tensor<2x1x2x128xf32>
    %cst_31 = stablehlo.constant dense<5.000000e-01> : tensor<f32>
    %240 = stablehlo.broadcast_in_dim %cst_31, dims = [] : (tensor<f32>) -> tensor<2x1x2x128xf32>
    %241 = stablehlo.multiply %240, %239 : tensor<2x1x2x128xf32>
    %242 = stablehlo.multiply %229, %241 : tensor<2x1x2x128xf32>
    %243 = stablehlo.convert %242 : (tensor<2x1x2x128xf32>) -> tensor<2x1x2x128xbf16>
    %244 = stablehlo.dot_general %243, %arg14, batching_dims = [2] x [0], contracting_dims = [3] x [1], precision = [DEFAULT, DEFAULT] : (tensor<2x1x2x128xbf16>, tensor<2x128x64xbf16>) -> tensor<2x2x1x64xf32>
    %245 = stablehlo.transpose %244, dims = [1, 2, 0, 3] : (tensor<2x2x1x64xf32>) -> tensor<2x1x2x64xf32>
    %246 = stablehlo.broadcast_in_dim %arg11, dims = [2, 3] : (tensor<2x64xbf16>) -> tensor<1x1x2x64xbf16>
    %247 = stablehlo.convert %246 : (tensor<1x1x2x64xbf16>) -> tensor<1x1x2x64xf32>
    %248 = stablehlo.broadcast_in_dim %247, dims = [0, 1, 2, 3] : (tensor<1x1x2x64xf32>) -> tensor<2x1x2x64xf32>
    %249 = stablehlo.add %245, %248 : tensor<2x1x2x64xf32>
    %250 = stablehlo.convert %249 : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x64xbf16>
    %251 = stablehlo.broadcast_in_dim %cst_2, dims = [3] : (tensor<32xf32>) -> tensor<1x1x1x32xf32>
    %252 = stablehlo.broadcast_in_dim %214, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1x1xi32>
    %253 = stablehlo.convert %252 : (tensor<2x1x1x1xi32>) -> tensor<2x1x1x1xf32>
    %254 = stablehlo.broadcast_in_dim %253, dims = [0, 1, 2, 3] : (tensor<2x1x1x1xf32>) -> tensor<2x1x1x32xf32>
    %255 = stablehlo.broadcast_in_dim %251, dims = [0, 1, 2, 3] : (tensor<1x1x1x32xf32>) -> tensor<2x1x1x32xf32>
    %256 = stablehlo.multiply %254, %255 : tensor<2x1x1x32xf32>
    %257 = stablehlo.cosine %256 : tensor<2x1x1x32xf32>
    %cst_32 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %258 = stablehlo.broadcast_in_dim %cst_32, dims = [] : (tensor<f32>) -> tensor<2x1x1x32xf32>
    %259 = stablehlo.multiply %257, %258 : tensor<2x1x1x32xf32>
    %260 = stablehlo.sine %256 : tensor<2x1x1x32xf32>
    %cst_33 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %261 = stablehlo.broadcast_in_dim %cst_33, dims = [] : (tensor<f32>) -> tensor<2x1x1x32xf32>
    %262 = stablehlo.multiply %260, %261 : tensor<2x1x1x32xf32>
    %263 = stablehlo.convert %250 : (tensor<2x1x2x64xbf16>) -> tensor<2x1x2x64xf32>
    %264 = stablehlo.slice %263 [0:2, 0:1, 0:2, 0:32] : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x32xf32>
    %265 = stablehlo.slice %263 [0:2, 0:1, 0:2, 32:64] : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x32xf32>
    %266 = stablehlo.broadcast_in_dim %259, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %267 = stablehlo.multiply %264, %266 : tensor<2x1x2x32xf32>
    %268 = stablehlo.broadcast_in_dim %262, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %269 = stablehlo.multiply %265, %268 : tensor<2x1x2x32xf32>
    %270 = stablehlo.subtract %267, %269 : tensor<2x1x2x32xf32>
    %271 = stablehlo.broadcast_in_dim %259, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %272 = stablehlo.multiply %265, %271 : tensor<2x1x2x32xf32>
    %273 = stablehlo.broadcast_in_dim %262, dims = [0, 1, 2, 3] : (tensor<2x1x1x32xf32>) -> tensor<2x1x2x32xf32>
    %274 = stablehlo.multiply %264, %273 : tensor<2x1x2x32xf32>
    %275 = stablehlo.add %272, %274 : tensor<2x1x2x32xf32>
    %276 = stablehlo.concatenate %270, %275, dim = 3 : (tensor<2x1x2x32xf32>, tensor<2x1x2x32xf32>) -> tensor<2x1x2x64xf32>
    %277 = stablehlo.convert %276 : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x64xbf16>
    %278 = stablehlo.reshape %211 : (tensor<2x32x2x64xbf16>) -> tensor<2x2x16x2x64xbf16>
    %279 = stablehlo.slice %278 [0:2, 0:1, 0:16, 0:2, 0:64] : (tensor<2x2x16x2x64xbf16>) -> tensor<2x1x16x2x64xbf16>
    %280 = stablehlo.slice %278 [0:2, 1:2, 0:16, 0:2, 0:64] : (tensor<2x2x16x2x64xbf16>) -> tensor<2x1x16x2x64xbf16>
    %281 = stablehlo.concatenate %279, %280, dim = 2 : (tensor<2x1x16x2x64xbf16>, tensor<2x1x16x2x64xbf16>) -> tensor<2x1x32x2x64xbf16>
    %282 = stablehlo.reshape %arg18 : (tensor<2x2048x128xbf16>) -> tensor<2x32x64x128xbf16>
    %283 = stablehlo.dot_general %arg17, %282, batching_dims = [0] x [0], contracting_dims = [2, 1] x [2, 1], precision = [DEFAULT, DEFAULT] : (tensor<2x32x64xbf16>, tensor<2x32x64x128xbf16>) -> tensor<2x128xf32>
    %284 = stablehlo.dot_general %282, %281, batching_dims = [0] x [3], contracting_dims = [2, 1] x [4, 2], precision = [DEFAULT, DEFAULT] : (tensor<2x32x64x128xbf16>, tensor<2x1x32x2x64xbf16>) -> tensor<2x128x2x1xf32>
    %285 = stablehlo.transpose %284, dims = [2, 3, 0, 1] : (tensor<2x128x2x1xf32>) -> tensor<2x1x2x128xf32>
    %286 = stablehlo.broadcast_in_dim %283, dims = [2, 3] : (tensor<2x128xf32>) -> tensor<1x1x2x128xf32>
    %287 = stablehlo.broadcast_in_dim %286, dims = [0, 1, 2, 3] : (tensor<1x1x2x128xf32>) -> tensor<2x1x2x128xf32>
    %288 = stablehlo.add %285, %287 : tensor<2x1x2x128xf32>
    %289 = stablehlo.broadcast_in_dim %arg15, dims = [2, 3] : (tensor<2x128xbf16>) -> tensor<1x1x2x128xbf16>
    %290 = stablehlo.convert %289 : (tensor<1x1x2x128xbf16>) -> tensor<1x1x2x128xf32>
    %291 = stablehlo.broadcast_in_dim %290, dims = [0, 1, 2, 3] : (tensor<1x1x2x128xf32>) -> tensor<2x1x2x128xf32>
    %292 = stablehlo.add %288, %291 : tensor<2x1x2x128xf32>
    %293 = stablehlo.multiply %292, %292 : tensor<2x1x2x128xf32>
    %294 = stablehlo.multiply %293, %292 : tensor<2x1x2x128xf32>
    %cst_34 = stablehlo.constant dense<4.471500e-02> : tensor<f32>
    %295 = stablehlo.broadcast_in_dim %cst_34, dims = [] : (tensor<f32>) -> tensor<2x1x2x128xf32>
    %296 = stablehlo.multiply %295, %294 : tensor<2x1x2x128xf32>
    %297 = stablehlo.add %292, %296 : tensor<2x1x2x128xf32>
    %cst_35 = stablehlo.constant dense<0.797884583> : tensor<f32>
    %298 = stablehlo.broadcast_in_dim %cst_35, dims = [] : (tensor<f32>) -> tensor<2x1x2x128xf32>
    %299 = stablehlo.multiply %298, %297 : tensor<2x1x2x128xf32>
    %300 = stablehlo.tanh %299 : tensor<2x1x2x128xf32>
    %cst_36 = stablehlo.constant dense<1.000000e+00> : tensor<f32>
    %301 = stablehlo.broadcast_in_dim %cst_36, dims = [] : (tensor<f32>) -> tensor<2x1x2x128xf32>
    %302 = stablehlo.add %301, %300 : tensor<2x1x2x128xf32>
    %cst_37 = stablehlo.constant dense<5.000000e-01> : tensor<f32>
    %303 = stablehlo.broadcast_in_dim %cst_37, dims = [] : (tensor<f32>) -> tensor<2x1x2x128xf32>
    %304 = stablehlo.multiply %303, %302 : tensor<2x1x2x128xf32>
    %305 = stablehlo.multiply %292, %304 : tensor<2x1x2x128xf32>
    %306 = stablehlo.convert %305 : (tensor<2x1x2x128xf32>) -> tensor<2x1x2x128xbf16>
    %307 = stablehlo.dot_general %306, %arg19, batching_dims = [2] x [0], contracting_dims = [3] x [1], precision = [DEFAULT, DEFAULT] : (tensor<2x1x2x128xbf16>, tensor<2x128x64xbf16>) -> tensor<2x2x1x64xf32>
    %308 = stablehlo.transpose %307, dims = [1, 2, 0, 3] : (tensor<2x2x1x64xf32>) -> tensor<2x1x2x64xf32>
    %309 = stablehlo.broadcast_in_dim %arg16, dims = [2, 3] : (tensor<2x64xbf16>) -> tensor<1x1x2x64xbf16>
    %310 = stablehlo.convert %309 : (tensor<1x1x2x64xbf16>) -> tensor<1x1x2x64xf32>
    %311 = stablehlo.broadcast_in_dim %310, dims = [0, 1, 2, 3] : (tensor<1x1x2x64xf32>) -> tensor<2x1x2x64xf32>
    %312 = stablehlo.add %308, %311 : tensor<2x1x2x64xf32>
    %313 = stablehlo.convert %312 : (tensor<2x1x2x64xf32>) -> tensor<2x1x2x64xbf16>
    %c_38 = stablehlo.constant dense<16> : tensor<i32>
    %314 = stablehlo.broadcast_in_dim %c_38, dims = [] : (tensor<i32>) -> tensor<2x1xi32>
    %315 = stablehlo.multiply %163, %314 : tensor<2x1xi32>
    %c_39 = stablehlo.constant dense<32> : tensor<i32>
    %316 = stablehlo.broadcast_in_dim %c_39, dims = [] : (tensor<i32>) -> tensor<2x1xi32>
    %317 = stablehlo.add %315, %316 : tensor<2x1xi32>
    %318 = stablehlo.broadcast_in_dim %108, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %319 = stablehlo.compare LE, %317, %318, SIGNED : (tensor<2x1xi32>, tensor<2x1xi32>) -> tensor<2x1xi1>
    %320 = stablehlo.iota dim = 0 : tensor<1xi32>
    %c_40 = stablehlo.constant dense<31> : tensor<i32>
    %321 = stablehlo.broadcast_in_dim %c_40, dims = [] : (tensor<i32>) -> tensor<1xi32>
    %322 = stablehlo.add %321, %320 : tensor<1xi32>
    %323 = call @_where_0(%319, %163, %322) : (tensor<2x1xi1>, tensor<2x1xi32>, tensor<1xi32>) -> tensor<2x1xi32>
    %324 = stablehlo.iota dim = 0 : tensor<2xi32>
    %325 = stablehlo.broadcast_in_dim %324, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %326 = stablehlo.broadcast_in_dim %325, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %327 = stablehlo.broadcast_in_dim %323, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %328 = stablehlo.concatenate %326, %327, dim = 2 : (tensor<2x1x1xi32>, tensor<2x1x1xi32>) -> tensor<2x1x2xi32>
    %329 = "stablehlo.scatter"(%arg2, %328, %277) <{indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [2, 3], inserted_window_dims = [0, 1], scatter_dims_to_operand_dims = [0, 1], index_vector_dim = 2>, unique_indices = true}> ({
    ^bb0(%arg30: tensor<bf16>, %arg31: tensor<bf16>):
      stablehlo.return %arg31 : tensor<bf16>
    }) : (tensor<2x31x2x64xbf16>, tensor<2x1x2xi32>, tensor<2x1x2x64xbf16>) -> tensor<2x31x2x64xbf16>
    %330 = stablehlo.broadcast_in_dim %325, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %331 = stablehlo.broadcast_in_dim %323, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %332 = stablehlo.concatenate %330, %331, dim = 2 : (tensor<2x1x1xi32>, tensor<2x1x1xi32>) -> tensor<2x1x2xi32>
    %333 = "stablehlo.scatter"(%arg3, %332, %313) <{indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [2, 3], inserted_window_dims = [0, 1], scatter_dims_to_operand_dims = [0, 1], index_vector_dim = 2>, unique_indices = true}> ({
    ^bb0(%arg30: tensor<bf16>, %arg31: tensor<bf16>):
      stablehlo.return %arg31 : tensor<bf16>
    }) : (tensor<2x31x2x64xbf16>, tensor<2x1x2xi32>, tensor<2x1x2x64xbf16>) -> tensor<2x31x2x64xbf16>
    %334 = stablehlo.broadcast_in_dim %arg8, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %335 = stablehlo.iota dim = 0 : tensor<1xi32>
    %336 = stablehlo.broadcast_in_dim %335, dims = [1] : (tensor<1xi32>) -> tensor<1x1xi32>
    %337 = stablehlo.broadcast_in_dim %336, dims = [0, 1] : (tensor<1x1xi32>) -> tensor<2x1xi32>
    %338 = stablehlo.add %334, %337 : tensor<2x1xi32>
    %c_41 = stablehlo.constant dense<32> : tensor<i32>
    %339 = call @remainder(%338, %c_41) : (tensor<2x1xi32>, tensor<i32>) -> tensor<2x1xi32>
    %340 = stablehlo.broadcast_in_dim %108, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %341 = stablehlo.compare LT, %338, %340, SIGNED : (tensor<2x1xi32>, tensor<2x1xi32>) -> tensor<2x1xi1>
    %342 = stablehlo.iota dim = 0 : tensor<1xi32>
    %c_42 = stablehlo.constant dense<32> : tensor<i32>
    %343 = stablehlo.broadcast_in_dim %c_42, dims = [] : (tensor<i32>) -> tensor<1xi32>
    %344 = stablehlo.add %343, %342 : tensor<1xi32>
    %345 = call @_where_0(%341, %339, %344) : (tensor<2x1xi1>, tensor<2x1xi32>, tensor<1xi32>) -> tensor<2x1xi32>
    %346 = stablehlo.iota dim = 0 : tensor<2xi32>
    %347 = stablehlo.broadcast_in_dim %346, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %348 = stablehlo.broadcast_in_dim %347, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %349 = stablehlo.broadcast_in_dim %345, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %350 = stablehlo.concatenate %348, %349, dim = 2 : (tensor<2x1x1xi32>, tensor<2x1x1xi32>) -> tensor<2x1x2xi32>
    %351 = "stablehlo.scatter"(%arg6, %350, %15) <{indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [2, 3], inserted_window_dims = [0, 1], scatter_dims_to_operand_dims = [0, 1], index_vector_dim = 2>, unique_indices = true}> ({
    ^bb0(%arg30: tensor<bf16>, %arg31: tensor<bf16>):
      stablehlo.return %arg31 : tensor<bf16>
    }) : (tensor<2x32x2x64xbf16>, tensor<2x1x2xi32>, tensor<2x1x2x64xbf16>) -> tensor<2x32x2x64xbf16>
    %352 = stablehlo.broadcast_in_dim %347, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %353 = stablehlo.broadcast_in_dim %345, dims = [0, 1] : (tensor<2x1xi32>) -> tensor<2x1x1xi32>
    %354 = stablehlo.concatenate %352, %353, dim = 2 : (tensor<2x1x1xi32>, tensor<2x1x1xi32>) -> tensor<2x1x2xi32>
    %355 = "stablehlo.scatter"(%arg7, %354, %18) <{indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [2, 3], inserted_window_dims = [0, 1], scatter_dims_to_operand_dims = [0, 1], index_vector_dim = 2>, unique_indices = true}> ({
    ^bb0(%arg30: tensor<bf16>, %arg31: tensor<bf16>):
      stablehlo.return %arg31 : tensor<bf16>
    }) : (tensor<2x32x2x64xbf16>, tensor<2x1x2xi32>, tensor<2x1x2x64xbf16>) -> tensor<2x32x2x64xbf16>
    %c_43 = stablehlo.constant dense<1> : tensor<i32>
    %356 = stablehlo.broadcast_in_dim %c_43, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %357 = stablehlo.subtract %108, %356 : tensor<2xi32>
    %c_44 = stablehlo.constant dense<0> : tensor<i32>
    %358 = stablehlo.broadcast_in_dim %c_44, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %359 = stablehlo.maximum %357, %358 : tensor<2xi32>
    %c_45 = stablehlo.constant dense<0> : tensor<i32>
    %360 = stablehlo.broadcast_in_dim %c_45, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %361 = stablehlo.compare GT, %arg8, %360, SIGNED : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %362 = stablehlo.maximum %arg9, %359 : tensor<2xi32>
    %363 = call @_where_2(%361, %362, %359) : (tensor<2xi1>, tensor<2xi32>, tensor<2xi32>) -> tensor<2xi32>
    %c_46 = stablehlo.constant dense<0> : tensor<i32>
    %364 = stablehlo.broadcast_in_dim %c_46, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %365 = stablehlo.compare GT, %arg8, %364, SIGNED : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %366 = stablehlo.compare LT, %arg8, %arg9, SIGNED : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %367 = stablehlo.and %365, %366 : tensor<2xi1>
    %c_47 = stablehlo.constant dense<2147483647> : tensor<i32>
    %368 = call @_where_4(%367, %c_47, %363) : (tensor<2xi1>, tensor<i32>, tensor<2xi32>) -> tensor<2xi32>
    %369 = stablehlo.reshape %47 : (tensor<2x1x8x64xbf16>) -> tensor<16x64xbf16>
    %370:3 = stablehlo.custom_call @__gpu$xla.gpu.triton(%arg8, %108, %369, %329, %333) {backend_config = "", mhlo.backend_config = {debug = false, grid_x = 1 : i32, grid_y = 2 : i32, grid_z = 2 : i32, ir = "ML\EFR\0DMLIR23.0.0git\00\01i\09\01\05\09\0DM\01\03\13\03!\17\1B\1F#'+/37;?CGKOS\05'W[_cgkosw{\7F\83\87\8B\8F\93\97\9B\9F\07\05\A3\A7\03\DA\02.\02=\01\FD\0F\0F\0F\0F\07\0F\0F\0F\13\0F\0F\0F\0F\0F\0F\0F\0F\0F\0F\0F\13\0F\17\17\0F\0F\0F\0F\0F\0F\13\13\0B\0B\0F\17\0F\0F\0F\0B\0B\0F\1F\0F3\0F\1F+\0B\0B\0B\0F\0B\0F\0B\0F\0B\1F\0B\0F\0F\0B'\0F\0B\1F\0F\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0F\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0F\0B\0F\0B\0B\0F\0B\0B\0F\0B\13\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\13\05\05YY\01\17\0B\1F\0B\13\0B\0B\13\0B\0B\13\0B\017\0F\1F\13\1B\1B\07\13\17\1B\0B\1F\1F\13\1B\17\17\1B\1B\07\0F\1B\1B\1F/\13\17\1B\03\07955\02\E2\09\1D\ED\EF\11\01\05\11\01\01\1D\DF\E1\1F\1D\8D\8F\1D\99\9B\1D\A7\A9\11\01\02\02\15ow\1D\D3\D5\1D\87\89\1D\93\95\1D\D9\DB\1D\AD\AF\1D\F9\FB\11\01A\11\13\00\1D\B3\B5\1D\BF\C1\03\03aI\1D\B9\BB\1D\0A\02\0E\02\1D\22\02&\02\11\01}\11\01\11\1D\C5\C7\13\0B\01\11'\09\1D\CB\CD\11\01\02|\11\01\02\04\05U\05W\11\13\01\1D\16\02\1A\02\11\01\81\1Dik\1D\A1\A3\05Y\05[\11'\0D\13\0B\10;^+8\1D\E7\E9#\01\05\11\01\00\00\00\00\00\00\00\1D\F3\F5\13\0B\D0\8E*\8E\0F\01\11))))))))\05]\0D/\05_\11\01\09\05a\1Dm\13\05c\1Dqs\05e-u\09c\19q\07\05g\15y\7F\1D{}\05i-Q\09\D6\03\17\EE\03\07\1D\81\83\05k-Q\07\C2\03\13S\11\01=\05m\1D\8B\13\05o\05q\1D\91\13\05s\05u\1D\97\13\05w\05y\1D\9D\13\05{\11\01!\05}\1D\A5\13\05\7F\05\81\1D\AB\13\05\83\05\85\1D\B1\13\05\87\05\89\1D\B7\13\05\8B\05\8D\1D\BD\13\05\8F\05\91\1D\C3\13\05\93\05\95\1D\C9\13\05\97\05\99\1D\CF\13\05\9B\11\01\FD\05\9D\1D\D7\13\05\9F\05\A1\1D\DD\13\05\A3\05\A5\1D\E3\13\05\A7\11\01\02 \05\A9\1D\EB\13\05#\05\AB\1D\F1\13\05\AD\05\AF\1D\F7\13\05\B1\05\B3\1D\02\02\13#arith.overflow<none>\00#arith.fastmath<none>\00\05\B5\13\0B\90\B2|R<\05\B7\1D\12\02\13\05\B9\05\BB\1D\1E\02\13\05\BD\05\BF\1D*\02\13\05\C1\01\02\02\1B\05\02\02\02\02\01\1B\03A\01\1B\05A\02\02\01\1B\05A\02\02\0B\0B\1B\03A\0B\1B\03\02\02\01\1B\05\05\02\02\01\01\09\1B\05\02\02\02\027\1B\05\02\02\02\02%\1B\03A9\1B\05\02\02\05\01\1B\05A\05\0B\1B\05A\05\01\1B\05A\02\02%\1B\05A\02\027\07\01\02\04\1B\05A\02\029\1B\05\02\02\05\13\1B\05\02\02\02\02\13\05\11;;777999\01\1B\03A\13\1B\03\02\02\13\1B\05A\02\02\13!tt.ptr<bf16>\00!tt.ptr<f32>\00!tt.ptr<i32>\00\04~G\05\01P\09\01\07\04ZG\03\01\05\1FP\09\03\07\04.G\03R\04f\08\11uummmqqq\00#B\09\05\03\01#B\09\07\03\01=\06\09\03\01\05\11\13?F\09\09\03\01\05\11\13#B\09\07\03\01=\06\09\03\01\05\17\19?F\09\09\03\01\05\17\19\19B\09\07\03\01\19B\09\0B\03\01#B\09\07\03\01'F\09\0D\03\01\05!##B\09\07\03\01'F\09\0D\03\01\05!'#B\09\05\03\01#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05+/#B\09\11\03\01'F\09\0D\03\01\05-3#B\09\05\03\01#B\09\05\03\01#B\09\13\03\01'F\09\0D\03\01\057;#B\09\11\03\01'F\09\0D\03\01\059?#B\09\05\03\01#B\09\05\03\01#B\09\13\03\01'F\09\0D\03\01\05CG#B\09\11\03\01'F\09\0D\03\01\05EK#B\09\05\03\01#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05OS#B\09\11\03\01'F\09\0D\03\01\05QW#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05[]#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05ac\09BK\15\03\05#B\17\17\03\01\03\06\17\03\05\03i)\06\17\03\05\05gk#B\0B\19\03\01'F\0B\0D\03\01\05\1Bo#B\19\19\03\01\03\06\19\03\05\03s+F\19\09\03\05\05mu\03\06\0D\03\05\03q%F\0D\0D\03\05\05yw#B\17\05\03\01\03\06\17\03\05\03})\06\17\03\05\05{\7F#B\0B\07\03\01'F\0B\0D\03\01\05!\83\03\06\0D\03\05\03\85%F\0D\0D\03\05\05\87\81#B\0B\1B\03\01\03\06\0B\03\05\03\8B'F\0B\0D\03\05\05\89\8D#B\0B\19\03\01'F\0B\0D\03\01\05\1F\91\03\06\0D\03\05\03\93%F\0D\0D\03\05\05\8F\95#BM\19\03\01\03\06M\03\05\03\99E\06M\03\05\05m\9B%F\0D\0D\03\05\05\97\9D#B\0F\05\03\01\03\06\0F\03\07\03\A1\07F\0F\07\03\1F\03\9F\05\06\0F\03\07\03\A5\03\06\0F\03\07\031%F\0F\0D\03\07\05\A7\A9#B\0F\11\03\01\03\06\0F\03\07\03\AD'F\0F\0D\03\07\05\AB\AF%F\0F\0D\03\07\05\A3\B1\09B\0F\1D\03\0F\07F\0F\05\03\11\03\B5\05\06\0F\03\07\03\B7\03\06\0F\03\07\035%F\0F\0D\03\07\05\B9\BB#B\0F\07\03\01\03\06\0F\03\07\03\BF'F\0F\0D\03\07\05\BD\C1%F\0F\0D\03\07\05\B3\C3\03\06\0F\03#\03\05\0B\06\0F\03#\05\C7\C5\0DF\0F\1F\03!\03\C9#B\0F\05\03\01#B\0F\05\03\01%F\0F\0D\03\01\05\CF%#B\0F\07\03\01'F\0F\0D\03\01\05\D1\D3%F\0F\0D\03\01\05\CD\D5\0B\06\0F\03;\05\01\D7\0DF\0F\1F\03\01\03\D9#B\0F\05\03\01#B\0F\05\03\01%F\0F\0D\03\01\05\DF)#B\0F\07\03\01'F\0F\0D\03\01\05\E1\E3%F\0F\0D\03\01\05\DD\E5\0B\06\0F\03;\05\03\E7\0DF\0F\1F\03\01\03\E9#B\0B\19\03\01'F\0B\0D\03\01\05\1B\ED%F\0D\0D\03\01\05\DB\EF#B\0D\07\03\01%F\0D\0D\03\01\05\1B\F3#B\0B\19\03\01'F\0B\0D\03\01\05\F5\F7#B\17\07\03\01)\06\17\03\01\05\F9\FB%F\0D\0D\03\01\05\DB\FD)\06\17\03\01\05\FF\EB#B\1D\07\03\019F\1D\0D\03\01\05\02\02\06\02#B\1D!\03\019F\1D\0D\03\01\05\0A\02\0E\02#B\0D\07\03\01%F\0D\0D\03\01\05\12\02\16\02#B%\05\03\01;\06%\03\01\05\1A\02\1E\02#B\19\0F\03\01+F\19\09\03\01\05\22\02&\02#B\0D\07\03\01%F\0D\0D\03\01\05*\02.\02#B+\13\03\01-F+#\03\13\05\0A\026\02#B'\05\03\01/\065\03\01\07:\02>\022\02#B\17\13\03\01)\06\17\03\01\05B\02F\02-F;%\03\13\05\F1\0A\02#B'\05\03\01/\065\03\01\07N\02J\02R\02#B\0D'\03\01%F\0D\0D\03\01\05V\02Z\02#B\19\11\03\01+F\19\09\03\01\05^\02b\02'F\0B\0D\03\01\05f\02\15#B\19\07\03\01+F\19\09\03\01\05j\02n\02#B\0D\07\03\01%F\0D\0D\03\01\05\15v\02'F\0B\0D\03\01\05f\02z\02#B\19\07\03\01+F\19\09\03\01\05~\02\82\02#B\1D!\03\019F\1D\0D\03\01\05\F1\8A\02#B\0D\07\03\01%F\0D\0D\03\01\05\8E\02\92\02#B%\05\03\01;\06%\03\01\05\96\02\9A\02#B\19\0F\03\01+F\19\09\03\01\05\9E\02\A2\02#B\0D\07\03\01%F\0D\0D\03\01\05\A6\02\AA\02#B+\13\03\01-F+#\03\13\05\F1\B2\02#B'\05\03\01/\065\03\01\07\B6\02\BA\02\AE\02)\06\17\03\01\05\BE\02V\02#B\19\11\03\01+F\19\09\03\01\05\C2\02\C6\02;\06%\03\01\05\CA\02r\02)\06\17\03\01\05\CE\02\86\02\03\06\0D\03\05\03\DB%F\0D\0D\03\05\05\D6\02\81\03\06+\03\05\03\EB-F+#\031\05\DA\02\DE\02\03\06\17\03\05\03\0A\02)\06\17\03\05\05\DA\02\E6\02#B\15)\03\0B\03\06\15\03\09\03\EE\02#B\15+\03\0B\03\06\15\03\0D\03\F6\02#B\15)\03\0B\03\06\15\03\0D\03\FE\02#B\1B\07\03\01IV\1B\09\07\09\0D\0D\0Dr\02\D2\02\06\03\F2\02\FA\02\02\03\05\03\EF\A6\03\09\03\1B\13\1B\1B\1B\1B\1B\00#B\0B\11\03\01'F\0B\0D\03\01\05R\04b\04#B\0B\11\03\01'F\0B\0D\03\01\05R\04j\04\09BK\1D\03\0F\03\06\0D\03\0F\03n\04%F\0D\0D\03\0F\05v\04r\04#B\01\05\03\01\03\06\01\03\03\03~\04#B\01\05\03\01\03\06\01\03\03\03\86\04\03\06\01\03\03\03!%F\01\0D\03\03\05\8A\04\8E\04#B\01-\03\01\03\06\01\03\03\03\96\04'F\01\0D\03\03\05\92\04\9A\04%F\01\0D\03\03\05\82\04\9E\04\09B\01\1D\03\0F\03\06\01\03\0F\03f\04%F\01\0D\03\0F\05\AA\04\A6\04\07F\01\07\03\1B\03\AE\04\05\06\01\03\03\03\B2\04\03\06\01\03\03\03=%F\01\0D\03\03\05\B6\04\BA\04#B\01/\03\01\03\06\01\03\03\03\C2\04'F\01\0D\03\03\05\BE\04\C6\04%F\01\0D\03\03\05\A2\04\CA\04#B\01\05\03\01\03\06\01\03\03\03\D2\04\03\06\01\03\03\03\1F%F\01\0D\03\03\05\D6\04\DA\04#B\01\11\03\01\03\06\01\03\03\03\E2\04'F\01\0D\03\03\05\DE\04\E6\04%F\01\0D\03\03\05\CE\04\EA\04\09B\01\1D\03\0F\07F\01\05\03\11\03\F2\04\05\06\01\03\03\03\F6\04\03\06\01\03\03\03A%F\01\0D\03\03\05\FA\04\FE\04#B\01\07\03\01\03\06\01\03\03\03\06\05'F\01\0D\03\03\05\02\05\0A\05%F\01\0D\03\03\05\EE\04\0E\05\03\06\01\03\15\03\07\0B\06\01\03\15\05\16\05\12\05\0DF\01\1F\03\17\03\1A\05\1DF[1\03\17\03\1E\05#B\1F)\03\0B\03\06\1F\03\09\03&\05\0FF\1F3\03\09\07\CB\22\05*\05#B\0B5\03\0B\03\06\0B\03\09\032\051F\0B7\03\09\05.\056\05\11V-\07\03\0D\03:\05\07\04/\03\07\0B\05\17-\17-\005F%9\03\0B\05\01\03\15\04-\03\055F%9\03\0D\05Z\04>\05\07F\15\07\03\1D\03B\05\05\06\1D\03\09\03F\057F\1D7\03\09\05:\05J\05\13FG;\03\09\03N\057F\1D7\03\0D\05Z\04B\05\13FG;\03\0D\03V\05#B\01\05\03\01\03\06\01\03\03\03^\05#B\01\05\03\01\03\06\01\03\03\03f\05\03\06\01\03\03\03!%F\01\0D\03\03\05j\05n\05#B\01-\03\01\03\06\01\03\03\03v\05'F\01\0D\03\03\05r\05z\05%F\01\0D\03\03\05b\05~\05\09B\01\1D\03\0F\03\06\01\03\0F\03f\04%F\01\0D\03\0F\05\8A\05\86\05\07F\01\07\03\1B\03\8E\05\05\06\01\03\03\03\92\05\03\06\01\03\03\03I%F\01\0D\03\03\05\96\05\9A\05#B\01/\03\01\03\06\01\03\03\03\A2\05'F\01\0D\03\03\05\9E\05\A6\05%F\01\0D\03\03\05\82\05\AA\05#B\01\05\03\01\03\06\01\03\03\03\B2\05\03\06\01\03\03\03\1F%F\01\0D\03\03\05\B6\05\BA\05#B\01\11\03\01\03\06\01\03\03\03\C2\05'F\01\0D\03\03\05\BE\05\C6\05%F\01\0D\03\03\05\AE\05\CA\05\09B\01\1D\03\0F\07F\01\05\03\11\03\D2\05\05\06\01\03\03\03\D6\05\03\06\01\03\03\03M%F\01\0D\03\03\05\DA\05\DE\05#B\01\07\03\01\03\06\01\03\03\03\E6\05'F\01\0D\03\03\05\E2\05\EA\05%F\01\0D\03\03\05\CE\05\EE\05\03\06\01\03\15\03\09\0B\06\01\03\15\05\F6\05\F2\05\0DF\01\1F\03\17\03\FA\05\07F\15\07\03\1D\03Z\05\05\06\0B\03\09\03\02\061F\0B7\03\09\05V\04\06\06CF'=\03!\03R\05#B\1F)\03\0B\03\06\1F\03\09\03\12\06\0FF\1F3\03\09\07\0E\06\FE\05\16\063F\0D7\03\09\05\0A\06\1A\061F\0B7\03\0D\05^\04Z\05\11V/\07\03\0D\03R\05\07\04/\03\07\0B\05\17/\17/\003F\0D7\03\0B\05\01\03\15\04/\03\053F\0D7\03\0D\05\22\06&\06K\04\1B\07\1E\06B\05*\06#B\1B\07\03\01IV\1B\09\07\09\0D\0D\0D\D2\02\86\02\16\03\0A\03\0E\03\12\03\05\03F\02v\04\09\03\1B\13\1B\1B\1B\1B\1B\00#B\0B\11\03\01'F\0B\0D\03\01\05R\04b\04#B\0B\11\03\01'F\0B\0D\03\01\05R\04j\04\09BK\1D\03\0F\03\06\0D\03\0F\03n\04%F\0D\0D\03\0F\05v\04r\04\03\06+\03\0F\03V\02-F+#\033\05z\04~\04\1BFW=\03+\03\82\04\05\06\15\03-\03\86\04#B\01\05\03\01\03\06\01\03\03\03\8E\04#B\01\05\03\01\03\06\01\03\03\03\96\04\03\06\01\03\03\03!%F\01\0D\03\03\05\9A\04\9E\04#B\01-\03\01\03\06\01\03\03\03\A6\04'F\01\0D\03\03\05\A2\04\AA\04%F\01\0D\03\03\05\92\04\AE\04\09B\01\1D\03\0F\03\06\01\03\0F\03f\04%F\01\0D\03\0F\05\BA\04\B6\04\07F\01\07\03\1B\03\BE\04\05\06\01\03\03\03\C2\04\03\06\01\03\03\03=%F\01\0D\03\03\05\C6\04\CA\04#B\01/\03\01\03\06\01\03\03\03\D2\04'F\01\0D\03\03\05\CE\04\D6\04%F\01\0D\03\03\05\B2\04\DA\04#B\01\05\03\01\03\06\01\03\03\03\E2\04\03\06\01\03\03\03\1F%F\01\0D\03\03\05\E6\04\EA\04#B\01\11\03\01\03\06\01\03\03\03\F2\04'F\01\0D\03\03\05\EE\04\F6\04%F\01\0D\03\03\05\DE\04\FA\04\09B\01\1D\03\0F\07F\01\05\03\11\03\02\05\05\06\01\03\03\03\06\05\03\06\01\03\03\03A%F\01\0D\03\03\05\0A\05\0E\05#B\01\07\03\01\03\06\01\03\03\03\16\05'F\01\0D\03\03\05\12\05\1A\05%F\01\0D\03\03\05\FE\04\1E\05\03\06\01\03\15\03\07\0B\06\01\03\15\05&\05\22\05#B\01\05\03\01\03\06\01\03\03\03.\05AF\01\09\03\17\032\05\0DF\01?\03\17\07*\05\8A\046\05\07F\15\05\03\11\03z\04\07F\15\07\03\1F\03\EA\02#B\0B\0F\03\01\03\06\0B\03\11\03F\05'F\0B\0D\03\11\05>\05J\05#B\0D\13\03\01\03\06\0D\03\11\03R\05%F\0D\0D\03\11\05N\05V\05\05\06;\03\07\03Z\05\05\06;\03\07\03B\05-F;%\035\05^\05b\05\1DF[1\03\17\03:\05#B\1F)\03\0B\03\06\1F\03\09\03n\05\0FF\1F3\03\09\07\CBj\05r\05#B\0B5\03\0B\03\06\0B\03\09\03z\051F\0B7\03\09\05v\05~\05#B'A\03\0B\03\06\15\03\09\03\86\05/\065\03\09\07f\05\82\05\8A\05\11V-\07\03\0D\03\8E\05\07\04/\03\07\0B\05\17-\17-\005F%9\03\0B\05\01\03\15\04-\03\055F%9\03\0D\05Z\04\92\05\07F\15\07\03\1D\03\96\05\05\06\1D\03\09\03\9A\057F\1D7\03\09\05\8E\05\9E\05\13FG;\03\09\03\A2\057F\1D7\03\0D\05Z\04\96\05\13FG;\03\0D\03\AA\05\1BFW=\03+\03\82\04\05\06\15\03-\03\B2\05#B\01\05\03\01\03\06\01\03\03\03\BA\05#B\01\05\03\01\03\06\01\03\03\03\C2\05\03\06\01\03\03\03!%F\01\0D\03\03\05\C6\05\CA\05#B\01-\03\01\03\06\01\03\03\03\D2\05'F\01\0D\03\03\05\CE\05\D6\05%F\01\0D\03\03\05\BE\05\DA\05\09B\01\1D\03\0F\03\06\01\03\0F\03f\04%F\01\0D\03\0F\05\E6\05\E2\05\07F\01\07\03\1B\03\EA\05\05\06\01\03\03\03\EE\05\03\06\01\03\03\03I%F\01\0D\03\03\05\F2\05\F6\05#B\01/\03\01\03\06\01\03\03\03\FE\05'F\01\0D\03\03\05\FA\05\02\06%F\01\0D\03\03\05\DE\05\06\06#B\01\05\03\01\03\06\01\03\03\03\0E\06\03\06\01\03\03\03\1F%F\01\0D\03\03\05\12\06\16\06#B\01\11\03\01\03\06\01\03\03\03\1E\06'F\01\0D\03\03\05\1A\06\22\06%F\01\0D\03\03\05\0A\06&\06\09B\01\1D\03\0F\07F\01\05\03\11\03.\06\05\06\01\03\03\032\06\03\06\01\03\03\03M%F\01\0D\03\03\056\06:\06#B\01\07\03\01\03\06\01\03\03\03B\06'F\01\0D\03\03\05>\06F\06%F\01\0D\03\03\05*\06J\06\03\06\01\03\15\03\09\0B\06\01\03\15\05R\06N\06#B\01\05\03\01\03\06\01\03\03\03Z\06AF\01\09\03\17\03^\06\0DF\01?\03\17\07V\06\B6\05b\06\07F\15\07\03\1D\03\AE\05\05\06\0B\03\09\03j\061F\0B7\03\09\05V\04n\06CF'=\03!\03\A6\05#B\1F)\03\0B\03\06\1F\03\09\03z\06\0FF\1F3\03\09\07v\06f\06~\063F\0D7\03\09\05r\06\82\061F\0B7\03\0D\05^\04\AE\05\11V/\07\03\0D\03\A6\05\07\04/\03\07\0B\05\17/\17/\003F\0D7\03\0B\05\01\03\15\04/\03\053F\0D7\03\0D\05\8A\06\8E\06K\04\1B\07\86\06\96\05\92\06#B\07\05\03\01\03\06\07\03\07\03&\03#B\07\05\03\01\03\06\07\03\07\03.\03\03\06\07\03\07\03\15%F\07\0D\03\07\052\036\03#B\07C\03\01\03\06\07\03\07\03>\03'F\07\0D\03\07\05:\03B\03%F\07\0D\03\07\05*\03F\03\07F\07\07\03\1F\03\9F\05\06\07\03\07\03N\03\03\06\07\03\07\03U%F\07\0D\03\07\05R\03V\03#B\07\11\03\01\03\06\07\03\07\03^\03'F\07\0D\03\07\05Z\03b\03%F\07\0D\03\07\05J\03f\03\09B\07\1D\03\0F\07F\07\05\03\11\03n\03\05\06\07\03\07\03r\03\03\06\07\03\07\03Y%F\07\0D\03\07\05v\03z\03#B\07\07\03\01\03\06\07\03\07\03\82\03'F\07\0D\03\07\05~\03\86\03%F\07\0D\03\07\05j\03\8A\03\03\06\07\03)\03\0B\0B\06\07\03)\05\92\03\8E\03\0DF\07\1F\03\09\03\96\03\17D\07E\05\96\03\1A\03#B'+\03\0B\03\06\15\03\0D\03\9E\03/\065\03\0D\07\E2\02\1E\03\A2\03#B\07\05\03\01\03\06\07\03\05\03\AA\03#B\07\05\03\01\03\06\07\03\05\03\B2\03\03\06\07\03\05\03\15%F\07\0D\03\05\05\B6\03\BA\03#B\07\0F\03\01\03\06\07\03\05\03\C2\03'F\07\0D\03\05\05\BE\03\C6\03%F\07\0D\03\05\05\AE\03\CA\03\03\06\07\03\05\03_%F\07\0D\03\05\05\9F\D2\03#B\07\07\03\01\03\06\07\03\05\03\DA\03'F\07\0D\03\05\05\D6\03\DE\03%F\07\0D\03\05\05\CE\03\E2\03\03\06\07\03\19\03\0D\0B\06\07\03\19\05\EA\03\E6\03\0DF\07\1F\03\0D\03\EE\03\17D\07E\05\EE\03\A6\03#B'\05\03\01G\06'\03\0B\03\F6\03\03\06\15\03\0D\03\FA\03/\065\03\0D\07\E2\02\22\03\FE\03#B\07\05\03\01\03\06\07\03\05\03\06\04#B\07\05\03\01\03\06\07\03\05\03\0E\04\03\06\07\03\05\03\15%F\07\0D\03\05\05\12\04\16\04#B\07\0F\03\01\03\06\07\03\05\03\1E\04'F\07\0D\03\05\05\1A\04\22\04%F\07\0D\03\05\05\0A\04&\04\03\06\07\03\05\03e%F\07\0D\03\05\05\9F.\04#B\07\07\03\01\03\06\07\03\05\036\04'F\07\0D\03\05\052\04:\04%F\07\0D\03\05\05*\04>\04\03\06\07\03\19\03\0F\0B\06\07\03\19\05F\04B\04\0DF\07\1F\03\0D\03J\04\17D\07E\05J\04\02\04!\00\09\06\03\01\05\01\00.\0F\C3\17\1935\17\19\19\1B\15\17\19\1B\13\0B\0D\0D\0F#%\07\09\13\15+-\07\09\09\0B\09\0B\09\0B\09\0B\09\0B\09\0B\09\0B\09\0B\0F\19O\19\0B\0D\0F!?-\0B7\0D\09\0F\0D\0F\0F\0D\0D\0D\0B\0B\11\0B\0B\0F\0B\0D\0D\0B\0B\13\0F\0B\0D\11\1F\0D\1D/\0F\09\0B\0F\17\19\15\0D\0F\09\0D\07\11builtin\00tt\00arith\00scf\00module\00splat\00broadcast\00expand_dims\00make_range\00addptr\00load\00dot\00reduce\00elementwise_inline_asm\00reduce.return\00store\00get_program_id\00reshape\00trans\00func\00return\00constant\00addi\00muli\00minsi\00divsi\00cmpi\00select\00mulf\00addf\00maxnumf\00subf\00subi\00maxsi\00remui\00divui\00uitofp\00truncf\00remsi\00sitofp\00for\00yield\00ex2.approx.ftz.f32 $0, $1;\00=f,f\00nsa_decode_compressed\00/work/main/nsa_jax/dispatch.py\00tt.divisibility\00public\00iota:\00iota\00by_platform\00/work/main/pallas_kernels/platforms.py\00_attend_fwd\00attend\00min:\00min\00mul:\00mul\00div:\00div\00add:\00add\00rem:\00rem\00get:\00get\00sub:\00sub\00max:\00max\00lt:\00lt\00convert_element_type:\00convert_element_type\00select_n:\00select_n\00le:\00le\00broadcast_in_dim:\00broadcast_in_dim\00while:\00while\00swap:\00swap\00reshape:\00masked_load:\00masked_load\00transpose:\00transpose\00dot_general:\00dot_general\00reduce_max:\00reduce_max\00elementwise_inline_asm_p:\00elementwise_inline_asm_p\00reduce_sum:\00reduce_sum\00\08\CBG\05\9F\01\0B\BFc\01O\CB\03\05\03\03\03\01\03g\05\F6\03\03!\03\11\031\05!\05\03\85\033\03\9F\05\11\05\0D\07\07G\07\01\03\03I\039\03S\03\D1\037\03U\03=\03?\03Y\05\0B\0B\03]\07\FE\03\01\05\FE\03\09AC\03E\05\01\01\0F\07\07G\0D\03\03\03\05\06\02\03\E5\07\07\07\01", name = "nsa_decode_compressed", num_stages = 3 : i32, num_warps = 4 : i32}, operand_layouts = [dense<0> : tensor<1xindex>, dense<0> : tensor<1xindex>, dense<[1, 0]> : tensor<2xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>], result_layouts = [dense<[2, 1, 0]> : tensor<3xindex>, dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>]} : (tensor<2xi32>, tensor<2xi32>, tensor<16x64xbf16>, tensor<2x31x2x64xbf16>, tensor<2x31x2x64xbf16>) -> (tensor<1x16x64xf32>, tensor<1x16xf32>, tensor<1x16xf32>)
    %371 = stablehlo.reshape %47 : (tensor<2x1x8x64xbf16>) -> tensor<2x1x2x4x64xbf16>
    %372:7 = stablehlo.custom_call @__gpu$xla.gpu.triton(%arg8, %108, %371, %125, %129, %147, %151) {backend_config = "", mhlo.backend_config = {debug = false, grid_x = 2 : i32, grid_y = 2 : i32, grid_z = 16 : i32, ir = "ML\EFR\0DMLIR23.0.0git\00\01m\09\01\05\09\0DQ\01\03\13\03!\17\1B\1F#'+/37;?CGKOS\05)W[_cgkosw{\7F\83\87\8B\8F\93\97\9B\9F\A3\07\07\A7\AB\AF\03Z\03\96\02I\01\FD\0F\17\0F\0F\07\13\0F\0F\0F\0F\0F\0F\0F\0F\0F\17\0F\17\0F\13\0F\0F\0F\13\0F\0F\0F\17\0F\0F\17\0F\0F\0F\0F\0F\0F\0F\17\17\13\0B\0B\0F\17\17\13\17\0F3\17\1F\0B\0F\0B\1F\13\0F\1F\0F\17C\0B\0B\0B\0B\0F\0B\0F\0B\1F\0B\0F\0F\0B'\0F\0B\1F\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\13\05\05YY\01K\0B\0B\13\0B\0B\13\0B\0B\13\0B\0B\13\0B\0B\13\0B\0B\13\0B\0B\13\0B\0B\13\0B\0B\13\0B\1F\0B\13\0B\0F\0B\13\0B\1F\01C\0F\13\1F\1B\1B\17\07\13\0B\1F\1F\13\1B\13\1B\17\1B\1B\17\0F\17\17\1B\1B\1B\1F\17\07\1B\13G\17\17\03\07595\02&\0C\1D\E1\E3\1D\06\02\0A\02\11\01\01\11\01\05\1F\11\01\02\02\1D\B7\B9\1D\DB\DD\1D\83\85\1D\E7\E9\1D\BD\BF\11\01A\15\89\91\1D\9F\A1\1D\A5\A7\1DZ\02^\02\1D\F9\FB\1D6\02:\02\11\11\00\11\01\02\10\1D\B1\B3\11\01!\1D\C3\C5\03\03}a\1D\F3\F5\11'\09\1D\C9\CB\1DB\02F\02\1D\AB\AD\13\0D\01\1Df\02j\02\1D\CF\D1\1D\D5\D7\11\01\1D\11'\01\11'\15\11\01\11\1D\ED\EF\1D\12\02\16\02\11\01\04\00\10\11\01\02\04\05Y\05[\11\11\01\1DN\02R\02\1D\86\02\8A\02\11\01\02\08\1D\1E\02\22\02\11\01\81#\01\05\11\01\00\00\00\00\00\00\00\1D*\02.\02\13\0D\D0\8E*\8E\0F\05]\11\01\09\05_\13\0D\10;^+8\11\01\02 \11'\0D\13\0D\90\B2|R<\11\01=\1Dv\02z\02\01\1D//////////////\05a\0D=\05c\05e\1D\87\19\05g\1D\8B\8D\05i-\8F\09c\19q\07\05k\15\93\99\1D\95\97\05m-m\09\D6\03\17\EE\03\07\1D\9B\9D\05o-m\07\C2\03\13S\05q\1D\A3\19\05s\05u\1D\A9\19\05w\05y\1D\AF\19\05{\05}\1D\B5\19\05\7F\05\81\1D\BB\19\05\83\05\85\1D\C1\19\05\87\05\89\1D\C7\19\05\8B\05\8D\1D\CD\19\05\8F\05\91\1D\D3\19\05\93\05\95\1D\D9\19\05\1B\05\97\1D\DF\19\05\99\05\9B\1D\E5\19\05\9D\05\9F\1D\EB\19\05\A1\05\A3\1D\F1\19\05\A5\05\A7\1D\F7\19\05\A9\05\AB\1D\02\02\19#arith.overflow<none>\00#arith.fastmath<none>\00\05\AD\05\AF\1D\0E\02\19\05\B1\05\B3\1D\1A\02\19\05\B5\05\B7\1D&\02\19\05\B9\05\BB\1D2\02\19\05\BD\05\BF\1D>\02\19\05\C1\05\C3\1DJ\02\19\05\C5\05\C7\1DV\02\19\05\C9\05\CB\1Db\02\19\05\CD\05\CF\1Dn\02\19\05\D1\11\01\D0\FF\FF\FF?\05\D3\1D~\02\19\05\D5\11'\11\05\D7\1D\8E\02\19\05\D9\11\01\10\00\00\00\10\01\02\02\1B\03A\01\1B\05\02\02\02\02\01\1B\05A\02\02\01\1B\05A\02\02\0D\1B\03\02\02\01\0B\1B\03A\0D\01\09\1B\05\02\02\02\027\1B\05\02\02\02\02E\1B\03A\11\1B\05\05\02\02\01\1B\03AC\1B\05A\02\027\1B\03\02\02\11\1B\05A\02\02\11\1B\05\02\02\05\01\1B\05A\05\0D\01\02\04\1B\05A\05\01\1B\05A\05\11\1B\05A\02\02E\1B\05A\02\02C\1B\05\02\02\05\11\1B\05\02\02\02\02\11\1B\05AA\01\07\1B\05\05\02\02\11\1B\03AG\05\1DGGEEEEEGCCCCCC\01\1B\05\05A\01\1B\05AA\11!tt.ptr<f32>\00!tt.ptr<bf16>\00!tt.ptr<i32>\00\04\BA\9C\05\01P\09\01\07\04\96\9C\03\01\05\1FP\09\03\07\04j\9C\03N\02F\04\1D\8D\8D\89\89\89\89\89\8D\85\85\85\85\85\85\00\1BB\09\05\03\01#B\09\07\03\01G\06\09\03\01\05\1D\1FIF\09\09\03\01\05\1D\1F#B\09\0B\03\01G\06\09\03\01\05#%IF\09\09\03\01\05#%\1BB\09\07\03\01\1BB\09\0B\03\01#B\09\07\03\01'F\09\0D\03\01\05+/#B\09\07\03\01'F\09\0D\03\01\05+3#B\09\05\03\01#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\057;#B\09\11\03\01'F\09\0D\03\01\059?#B\09\05\03\01#B\09\05\03\01#B\09\13\03\01'F\09\0D\03\01\05CG#B\09\11\03\01'F\09\0D\03\01\05EK#B\09\05\03\01#B\09\05\03\01#B\09\13\03\01'F\09\0D\03\01\05OS#B\09\11\03\01'F\09\0D\03\01\05QW#B\09\05\03\01#B\09\05\03\01#B\09\13\03\01'F\09\0D\03\01\05[_#B\09\11\03\01'F\09\0D\03\01\05]c#B\09\05\03\01#B\09\05\03\01#B\09\13\03\01'F\09\0D\03\01\05gk#B\09\11\03\01'F\09\0D\03\01\05io#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05su#B\11\05\03\01+F\11\0D\03\01\05-y#B\1B\05\03\01-\06\1D\03\01\05}{#B\1B\15\03\011\069\03\01\05\81\7F#B\09\05\03\01#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05\85\89#B\09\11\03\01'F\09\0D\03\01\05\87\8D#B\11\05\03\01+F\11\0D\03\01\05-\91#B\1B\05\03\01-\06\1D\03\01\05\95\93#B\1B\15\03\011\069\03\01\05\99\97#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05\9D\9F#B\11\05\03\01+F\11\0D\03\01\05-\A3#B\1B\05\03\01-\06\1D\03\01\05\A7\A5#B\1B\15\03\011\069\03\01\05\AB\A9#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05\AF\B1#B\11\17\03\01+F\11\0D\03\01\05-\B5#B\1B\05\03\01-\06\1D\03\01\05\B9\B7#B\1B\15\03\011\069\03\01\05\BD\BB#B\09\05\03\01#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05\C1\C5#B\09\11\03\01'F\09\0D\03\01\05\C3\C9#B\11\17\03\01+F\11\0D\03\01\05-\CD#B\1B\05\03\01-\06\1D\03\01\05\D1\CF#B\1B\15\03\011\069\03\01\05\D5\D3#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05\D9\DB#B\11\17\03\01+F\11\0D\03\01\05-\DF#B\1B\05\03\01-\06\1D\03\01\05\E3\E1#B\1B\15\03\011\069\03\01\05\E7\E5#B\09\05\03\01#B\09\0F\03\01'F\09\0D\03\01\05\EB\ED#B)\05\03\01#B)\05\03\01%F)\0D\03\01\05\F31#B)\07\03\01'F)\0D\03\01\05\F5\F7%F)\0D\03\01\05\F1\F9\0B\06)\03G\05\01\FB\0DF)\19\03\01\03\FD%F\0D\0D\03\01\05\FF!#B)\05\03\01#B)\05\03\01%F)\0D\03\01\05\0A\025#B)\07\03\01'F)\0D\03\01\05\0E\02\12\02%F)\0D\03\01\05\06\02\16\02\0B\06)\03G\05\03\1A\02\0DF)\19\03\01\03\1E\02#B\15\17\03\01)F\15\1B\03\11\05-&\02AF\1B\09\03\01\03*\02#B-\05\03\01)F-\1D\03\11\05.\022\02M\14-\036\02\09\03\01\05K\00-\03j\04\DA\08\07B?\1F\03\03#B\15!\03\01\03\06\15\03\03\03R\02)F\15\1B\03\17\05N\02V\02\13FA#\03+\03Z\02\05\06\0F\03!\03^\02#B\01\05\03\01\03\06\01\03\07\03f\02#B\01\05\03\01\03\06\01\03\07\03n\02\03\06\01\03\07\03+%F\01\0D\03\07\05r\02v\02#B\01\13\03\01\03\06\01\03\07\03~\02'F\01\0D\03\07\05z\02\82\02%F\01\0D\03\07\05j\02\86\02#B\01\05\03\01\03\06\01\03\07\03\8E\02\03\06\01\03\07\03!%F\01\0D\03\07\05\92\02\96\02#B\01\13\03\01\03\06\01\03\07\03\9E\02'F\01\0D\03\07\05\9A\02\A2\02%F\01\0D\03\07\05\8A\02\A6\02#B\01\05\03\01\03\06\01\03\07\03\AE\02\03\06\01\03\07\03'%F\01\0D\03\07\05\B2\02\B6\02#B\01%\03\01\03\06\01\03\07\03\BE\02'F\01\0D\03\07\05\BA\02\C2\02%F\01\0D\03\07\05\AA\02\C6\02\07B\01\1F\03\03\09F\01\07\03)\03\CE\02\05\06\01\03\07\03\D2\02\03\06\01\03\07\03=%F\01\0D\03\07\05\D6\02\DA\02#B\01\11\03\01\03\06\01\03\07\03\E2\02'F\01\0D\03\07\05\DE\02\E6\02%F\01\0D\03\07\05\CA\02\EA\02\07B\01'\03\0B\09F\01\05\03\19\03\F2\02\05\06\01\03\07\03\F6\02\03\06\01\03\07\03A%F\01\0D\03\07\05\FA\02\FE\02#B\01\07\03\01\03\06\01\03\07\03\06\03'F\01\0D\03\07\05\02\03\0A\03%F\01\0D\03\07\05\EE\02\0E\03\03\06\01\03-\03\05\0B\06\01\03-\05\16\03\12\03#B\01\05\03\01\03\06\01\03\07\03\1E\037F\01\09\03\1D\03\22\03\0DF\01)\03\1D\07\1A\03b\02&\03#B\0F+\03\0D\03\06\0F\03\09\03.\03#B\0F-\03\0D\03\06\0F\03\0F\036\03#B\0F+\03\0D\03\06\0F\03\0F\03>\03#B\1D\05\03\01-\06\1D\03\01\05\02\02F\03#B=\11\03\01?F=\09\03\01\05J\03N\03#B5\05\03\01)F5/\03\11\05\02\02V\03)F\15\1B\03\11\05\02\02\22\029\06K\03\11\05Z\03^\03#B\0D\07\03\01%F\0D\0D\03\01\05R\03f\03#B\1B\05\03\01/\061\03\01\07b\03j\03n\03\07B?\1F\03\03\03\06\15\03\03\03r\03)F\15\1B\03\17\05v\03z\03#B\1B1\03\01\03\06\0F\03\03\03\82\03/\061\03\03\07~\03v\03\86\03#B\15\07\03\01\03\06\15\03\03\03\8E\03)F\15\1B\03\17\05v\03\92\03#B\113\03\01+F\11\0D\03\01\05R\03\9A\03\03\06\0D\03\03\03\9E\03%F\0D\0D\03\03\05\A2\03v\03/\061\03\03\07\96\03v\03\A6\03#By\0F\03\01)Fy5\03\11\05r\03\AE\03\03\061\03\17\03\B2\03/\061\03\03\07\B6\03\AA\03\8A\03#B[\05\03\01)F[\1D\03\11\05-\BE\03AF\1B\09\03\01\03\C2\03#B-\05\03\01)F-\1D\03\11\05\C6\03\CA\03M\14-\03\CE\03\09\03\01\05K\00-\03s\ED\07B?\1F\03\03#B5\05\03\01\03\065\03\03\03\BA\06)F5/\03\17\05\BA\03\BE\06#B\15\0F\03\01\03\06\15\03\03\03\C6\06)F\15\1B\03\17\05\B6\06\CA\069\06K\03\17\05\C2\06\CE\06#B\0D7\03\01\03\06\0D\03\03\03\D6\06%F\0D\0D\03\03\05\DA\06\B6\06/\061\03\03\07\D2\06\BA\03\DE\06\09F\0F\07\03)\03\E2\06\09F\0F\05\03?\03\E2\06\05\06\15\035\03\E6\06\05\06\15\035\03\EA\06)F\15\1B\03A\05\EE\06\F2\06AF\1B\09\035\03\F6\06\0FV\1F\05\03\03\03\FA\06\07\04/\03\07\0B\05\03\1F\03\1F\00%F\0D\0D\03\01\05\01\03\11\04\1F\03\05#B\15\0F\03\01\03\06\15\03\03\03\02\07)F\15\1B\03\17\05\FE\06\06\07#B\03\05\03\01\03\06\03\03\03\03\0E\07#B\03\05\03\01\03\06\03\03\03\03\16\07\03\06\03\03\03\03+%F\03\0D\03\03\05\1A\07\1E\07#B\039\03\01\03\06\03\03\03\03&\07'F\03\0D\03\03\05\22\07*\07%F\03\0D\03\03\05\12\07.\07#B\03\05\03\01\03\06\03\03\03\036\07\03\06\03\03\03\03!%F\03\0D\03\03\05:\07>\07#B\039\03\01\03\06\03\03\03\03F\07'F\03\0D\03\03\05B\07J\07%F\03\0D\03\03\052\07N\07#B\03\05\03\01\03\06\03\03\03\03V\07\03\06\03\03\03\03'%F\03\0D\03\03\05Z\07^\07#B\03\0F\03\01\03\06\03\03\03\03f\07'F\03\0D\03\03\05b\07j\07%F\03\0D\03\03\05R\07n\07\03\06\03\03\03\03w%F\03\0D\03\03\05\FE\06v\07#B\03\07\03\01\03\06\03\03\03\03~\07'F\03\0D\03\03\05z\07\82\07%F\03\0D\03\03\05r\07\86\07\03\06\03\03;\03\0F\0B\06\03\03;\05\8E\07\8A\07\0DF\03)\03\03\07\92\07\0A\07\BA\03\15D\03;\07\92\07\BA\03\0A\07K\00-#B\13\07\03\01'F\13\0D\03\01\05-\D2\03#B\1D\05\03\01-\06\1D\03\01\05\02\02\DA\03#B=\11\03\01?F=\09\03\01\05\DE\03\E2\03#B93\03\011\069\03\01\05\E6\03\EA\03#B\13\07\03\01'F\13\0D\03\01\05\EE\03\F2\03#B\13\11\03\01'F\13\0D\03\01\05\E6\03\FA\03+F\11\0D\03\01\05\02\02\FE\03#B\1D\05\03\01-\06\1D\03\01\05\02\04\06\04#B=\11\03\01?F=\09\03\01\05\0A\04\0E\04%F\0D\0D\03\01\05\F6\03\12\04#B\0D\07\03\01%F\0D\0D\03\01\05\16\04\1A\04#B5\05\03\01)F5/\03\11\05\02\02\22\04)F\15\1B\03\11\05\02\02\22\029\06K\03\11\05&\04*\04#B\1B\05\03\01/\061\03\01\07.\04\1E\042\04#B\0D\07\03\01%F\0D\0D\03\01\05\D6\03:\041\069\03\01\056\04>\04-\06\1D\03\01\05B\04\D6\03-\06\1D\03\01\05\F6\03\D6\031\069\03\01\05J\04F\04#B!\07\03\01OV!\09\07\09\0F\0F\0D\D6\03N\04R\042\03:\03B\03\05\03\02\02\EE\03\09\03!\13!\1F!\1F!\00\07B?\1F\03\03#B=\07\03\01?F=\09\03\01\05\B6\06\CA\06\03\06[\03\03\03\CE\06)F[\1D\03\17\05\C6\06\D2\06#B\1B\05\03\01\03\06\0F\03\03\03\DA\06/\061\03\03\07\D6\06\BA\03\DE\06\0FV\1F\05\03\01\03\E2\06\07\04/\03\07\0B\05\03\1F\03\1F\00%F\0D\0D\03\01\05\01\03\11\04\1F\03\05#B\13\11\03\01'F\13\0D\03\01\05\E6\06\EA\06#BM\07\03\01C\06M\03\01\05\B6\06\F2\06#B\13\11\03\01'F\13\0D\03\01\05\F6\06\FA\06%F\0D\0D\03\01\05\EE\06\FE\06#B\01\05\03\01\03\06\01\03\05\03\06\07#B\01\05\03\01\03\06\01\03\05\03\0E\07\03\06\01\03\05\03+%F\01\0D\03\05\05\12\07\16\07#B\01=\03\01\03\06\01\03\05\03\1E\07'F\01\0D\03\05\05\1A\07\22\07%F\01\0D\03\05\05\0A\07&\07\07B\01'\03\0B\03\06\01\03\0B\03\02\07%F\01\0D\03\0B\052\07.\07\09F\01\07\03#\036\07\05\06\01\03\05\03:\07\03\06\01\03\05\03I%F\01\0D\03\05\05>\07B\07#B\01?\03\01\03\06\01\03\05\03J\07'F\01\0D\03\05\05F\07N\07%F\01\0D\03\05\05*\07R\07#B\01\05\03\01\03\06\01\03\05\03Z\07\03\06\01\03\05\03'%F\01\0D\03\05\05^\07b\07#B\01\11\03\01\03\06\01\03\05\03j\07'F\01\0D\03\05\05f\07n\07%F\01\0D\03\05\05V\07r\07\07B\01'\03\0B\09F\01\05\03\19\03z\07\05\06\01\03\05\03~\07\03\06\01\03\05\03M%F\01\0D\03\05\05\82\07\86\07#B\01\07\03\01\03\06\01\03\05\03\8E\07'F\01\0D\03\05\05\8A\07\92\07%F\01\0D\03\05\05v\07\96\07\03\06\01\03\15\03\07\0B\06\01\03\15\05\9E\07\9A\07\0DF\01\19\03\13\03\A2\07\1DFeA\03\13\03\A6\07#B#+\03\0D\03\06#\03\09\03\AE\07\17F#C\03\09\07*\03\AA\07\B2\07#B\13E\03\0D\03\06\13\03\09\03\BA\073F\13G\03\09\05\B6\07\BE\07\0FV7\07\03\0F\03\C2\07\07\04/\03\07\0B\05\1B7\1B7\00;F\1DI\03\0D\05\01\03\11\047\03\05;F\1DI\03\0F\05\BE\06\C6\07\09F\0F\07\03%\03\CA\07\05\06\11\03\09\03\CE\07=F\11G\03\09\05\C2\07\D2\07\19FYK\03\09\03\D6\07=F\11G\03\0F\05\BE\06\CA\07\19FYK\03\0F\03\DE\07#B\01\05\03\01\03\06\01\03\05\03\E6\07#B\01\05\03\01\03\06\01\03\05\03\EE\07\03\06\01\03\05\03+%F\01\0D\03\05\05\F2\07\F6\07#B\01=\03\01\03\06\01\03\05\03\FE\07'F\01\0D\03\05\05\FA\07\02\08%F\01\0D\03\05\05\EA\07\06\08\07B\01'\03\0B\03\06\01\03\0B\03\02\07%F\01\0D\03\0B\05\12\08\0E\08\09F\01\07\03#\03\16\08\05\06\01\03\05\03\1A\08\03\06\01\03\05\03U%F\01\0D\03\05\05\1E\08\22\08#B\01?\03\01\03\06\01\03\05\03*\08'F\01\0D\03\05\05&\08.\08%F\01\0D\03\05\05\0A\082\08#B\01\05\03\01\03\06\01\03\05\03:\08\03\06\01\03\05\03'%F\01\0D\03\05\05>\08B\08#B\01\11\03\01\03\06\01\03\05\03J\08'F\01\0D\03\05\05F\08N\08%F\01\0D\03\05\056\08R\08\07B\01'\03\0B\09F\01\05\03\19\03Z\08\05\06\01\03\05\03^\08\03\06\01\03\05\03Y%F\01\0D\03\05\05b\08f\08#B\01\07\03\01\03\06\01\03\05\03n\08'F\01\0D\03\05\05j\08r\08%F\01\0D\03\05\05V\08v\08\03\06\01\03\15\03\09\0B\06\01\03\15\05~\08z\08\0DF\01\19\03\13\03\82\08\09F\0F\07\03%\03\E2\07\05\06\13\03\09\03\8A\083F\13G\03\09\05\BA\06\8E\08EF\1B#\03\1D\03\DA\07#B#+\03\0D\03\06#\03\09\03\9A\08\17F#C\03\09\07\96\08\86\08\9E\085F\0DG\03\09\05\92\08\A2\083F\13G\03\0F\05\C2\06\E2\07\0FV\1F\07\03\0F\03\DA\07\07\04/\03\07\0B\05\1B\1F\1B\1F\005F\0DG\03\0D\05\01\03\11\04\1F\03\055F\0DG\03\0F\05\AA\08\AE\08K\04!\07\A6\08\CA\07\B2\08#B!\07\03\01OV!\09\07\09\0F\0F\0DN\04F\04b\04V\04Z\04^\04\05\03R\02\8E\04\09\03!\13!\1F!\1F!\00\07B?\1F\03\03#B=\07\03\01?F=\09\03\01\05\B6\06\CA\06\03\06[\03\03\03\CE\06)F[\1D\03\17\05\C6\06\D2\06#B\1B\05\03\01\03\06\0F\03\03\03\DA\06/\061\03\03\07\D6\06\BA\03\DE\06\0FV\1F\05\03\01\03\E2\06\07\04/\03\07\0B\05\03\1F\03\1F\00%F\0D\0D\03\01\05\01\03\11\04\1F\03\05#B\13\11\03\01'F\13\0D\03\01\05\E6\06\EA\06#BM\07\03\01C\06M\03\01\05\B6\06\F2\06#B\13\11\03\01'F\13\0D\03\01\05\F6\06\FA\06%F\0D\0D\03\01\05\EE\06\FE\06\07B?'\03\0B\03\06\0D\03\0B\03\02\07%F\0D\0D\03\0B\05\0A\07\06\07\03\06_\03\0B\03\02\02)F_M\03\1F\05\0E\07\12\07\13FA#\031\03\16\07\05\06\0F\033\03\1A\07#B\01\05\03\01\03\06\01\03\05\03\22\07#B\01\05\03\01\03\06\01\03\05\03*\07\03\06\01\03\05\03+%F\01\0D\03\05\05.\072\07#B\01=\03\01\03\06\01\03\05\03:\07'F\01\0D\03\05\056\07>\07%F\01\0D\03\05\05&\07B\07\07B\01'\03\0B\03\06\01\03\0B\03\02\07%F\01\0D\03\0B\05N\07J\07\09F\01\07\03#\03R\07\05\06\01\03\05\03V\07\03\06\01\03\05\03I%F\01\0D\03\05\05Z\07^\07#B\01?\03\01\03\06\01\03\05\03f\07'F\01\0D\03\05\05b\07j\07%F\01\0D\03\05\05F\07n\07#B\01\05\03\01\03\06\01\03\05\03v\07\03\06\01\03\05\03'%F\01\0D\03\05\05z\07~\07#B\01\11\03\01\03\06\01\03\05\03\86\07'F\01\0D\03\05\05\82\07\8A\07%F\01\0D\03\05\05r\07\8E\07\07B\01'\03\0B\09F\01\05\03\19\03\96\07\05\06\01\03\05\03\9A\07\03\06\01\03\05\03M%F\01\0D\03\05\05\9E\07\A2\07#B\01\07\03\01\03\06\01\03\05\03\AA\07'F\01\0D\03\05\05\A6\07\AE\07%F\01\0D\03\05\05\92\07\B2\07\03\06\01\03\15\03\07\0B\06\01\03\15\05\BA\07\B6\07#B\01\05\03\01\03\06\01\03\05\03\C2\077F\01\09\03\13\03\C6\07\0DF\01)\03\13\07\BE\07\1E\07\CA\07\09F\0F\05\039\03\16\07\1DFeA\03\13\03\CE\07#B#+\03\0D\03\06#\03\09\03\DA\07\17F#C\03\09\07*\03\D6\07\DE\07#B\13E\03\0D\03\06\13\03\09\03\E6\073F\13G\03\09\05\E2\07\EA\07#B\1BO\03\0D\05\06\0F\03!\03\D2\07\03\06\0F\03\09\03\F2\07/\061\03\09\07\F6\07\EE\07\FA\07\0FV7\07\03\0F\03\FE\07\07\04/\03\07\0B\05\1B7\1B7\00;F\1DI\03\0D\05\01\03\11\047\03\05;F\1DI\03\0F\05\BE\06\02\08\09F\0F\07\03%\03\06\08\05\06\11\03\09\03\0A\08=F\11G\03\09\05\FE\07\0E\08\19FYK\03\09\03\12\08=F\11G\03\0F\05\BE\06\06\08\19FYK\03\0F\03\1A\08\13FA#\031\03\16\07\05\06\0F\033\03\22\08#B\01\05\03\01\03\06\01\03\05\03*\08#B\01\05\03\01\03\06\01\03\05\032\08\03\06\01\03\05\03+%F\01\0D\03\05\056\08:\08#B\01=\03\01\03\06\01\03\05\03B\08'F\01\0D\03\05\05>\08F\08%F\01\0D\03\05\05.\08J\08\07B\01'\03\0B\03\06\01\03\0B\03\02\07%F\01\0D\03\0B\05V\08R\08\09F\01\07\03#\03Z\08\05\06\01\03\05\03^\08\03\06\01\03\05\03U%F\01\0D\03\05\05b\08f\08#B\01?\03\01\03\06\01\03\05\03n\08'F\01\0D\03\05\05j\08r\08%F\01\0D\03\05\05N\08v\08#B\01\05\03\01\03\06\01\03\05\03~\08\03\06\01\03\05\03'%F\01\0D\03\05\05\82\08\86\08#B\01\11\03\01\03\06\01\03\05\03\8E\08'F\01\0D\03\05\05\8A\08\92\08%F\01\0D\03\05\05z\08\96\08\07B\01'\03\0B\09F\01\05\03\19\03\9E\08\05\06\01\03\05\03\A2\08\03\06\01\03\05\03Y%F\01\0D\03\05\05\A6\08\AA\08#B\01\07\03\01\03\06\01\03\05\03\B2\08'F\01\0D\03\05\05\AE\08\B6\08%F\01\0D\03\05\05\9A\08\BA\08\03\06\01\03\15\03\09\0B\06\01\03\15\05\C2\08\BE\08#B\01\05\03\01\03\06\01\03\05\03\CA\087F\01\09\03\13\03\CE\08\0DF\01)\03\13\07\C6\08&\08\D2\08\09F\0F\07\03%\03\1E\08\05\06\13\03\09\03\DA\083F\13G\03\09\05\BA\06\DE\08EF\1B#\03\1D\03\16\08#B#+\03\0D\03\06#\03\09\03\EA\08\17F#C\03\09\07\E6\08\D6\08\EE\085F\0DG\03\09\05\E2\08\F2\083F\13G\03\0F\05\C2\06\1E\08\0FV\1F\07\03\0F\03\16\08\07\04/\03\07\0B\05\1B\1F\1B\1F\005F\0DG\03\0D\05\01\03\11\04\1F\03\055F\0DG\03\0F\05\FA\08\FE\08K\04!\07\F6\08\06\08\02\09\13FA#\03+\03Z\02\05\06\0F\03!\03r\04#B\03\05\03\01\03\06\03\03\07\03z\04#B\03\05\03\01\03\06\03\03\07\03\82\04\03\06\03\03\07\03\83%F\03\0D\03\07\05\86\04\8A\04#B\03Q\03\01\03\06\03\03\07\03\92\04'F\03\0D\03\07\05\8E\04\96\04%F\03\0D\03\07\05~\04\9A\04#B\03\05\03\01\03\06\03\03\07\03\A2\04\03\06\03\03\07\03+%F\03\0D\03\07\05\A6\04\AA\04#B\03\13\03\01\03\06\03\03\07\03\B2\04'F\03\0D\03\07\05\AE\04\B6\04%F\03\0D\03\07\05\9E\04\BA\04#B\03\05\03\01\03\06\03\03\07\03\C2\04\03\06\03\03\07\03!%F\03\0D\03\07\05\C6\04\CA\04#B\03\13\03\01\03\06\03\03\07\03\D2\04'F\03\0D\03\07\05\CE\04\D6\04%F\03\0D\03\07\05\BE\04\DA\04#B\03\05\03\01\03\06\03\03\07\03\E2\04\03\06\03\03\07\03'%F\03\0D\03\07\05\E6\04\EA\04#B\03%\03\01\03\06\03\03\07\03\F2\04'F\03\0D\03\07\05\EE\04\F6\04%F\03\0D\03\07\05\DE\04\FA\04\07B\03\1F\03\03\09F\03\07\03)\03\02\05\05\06\03\03\07\03\06\05\03\06\03\03\07\03\8B%F\03\0D\03\07\05\0A\05\0E\05#B\03\11\03\01\03\06\03\03\07\03\16\05'F\03\0D\03\07\05\12\05\1A\05%F\03\0D\03\07\05\FE\04\1E\05\07B\03'\03\0B\09F\03\05\03\19\03&\05\05\06\03\03\07\03*\05\03\06\03\03\07\03\8F%F\03\0D\03\07\05.\052\05#B\03\07\03\01\03\06\03\03\07\03:\05'F\03\0D\03\07\056\05>\05%F\03\0D\03\07\05\22\05B\05\03\06\03\03/\03\11\0B\06\03\03/\05J\05F\05\0DF\03)\03\09\07N\05v\04f\04\15D\03;\07N\05f\04v\04#B\03\05\03\01\03\06\03\03\03\03V\05#B\03\05\03\01\03\06\03\03\03\03^\05\03\06\03\03\03\03\9B%F\03\0D\03\03\05b\05f\05#B\03\0F\03\01\03\06\03\03\03\03n\05'F\03\0D\03\03\05j\05r\05%F\03\0D\03\03\05Z\05v\05#B\03\05\03\01\03\06\03\03\03\03~\05\03\06\03\03\03\03+%F\03\0D\03\03\05\82\05\86\05#B\03\17\03\01\03\06\03\03\03\03\8E\05'F\03\0D\03\03\05\8A\05\92\05%F\03\0D\03\03\05z\05\96\05#B\03\05\03\01\03\06\03\03\03\03\9E\05\03\06\03\03\03\03!%F\03\0D\03\03\05\A2\05\A6\05#B\03\17\03\01\03\06\03\03\03\03\AE\05'F\03\0D\03\03\05\AA\05\B2\05%F\03\0D\03\03\05\9A\05\B6\05#B\03\05\03\01\03\06\03\03\03\03\BE\05\03\06\03\03\03\03'%F\03\0D\03\03\05\C2\05\C6\05#B\03!\03\01\03\06\03\03\03\03\CE\05'F\03\0D\03\03\05\CA\05\D2\05%F\03\0D\03\03\05\BA\05\D6\05\07B\03\1F\03\03\03\06\03\03\03\03\A1%F\03\0D\03\03\05\DE\05\E2\05#B\03\07\03\01\03\06\03\03\03\03\EA\05'F\03\0D\03\03\05\E6\05\EE\05%F\03\0D\03\03\05\DA\05\F2\05\03\06\03\03\1B\03\13\0B\06\03\03\1B\05\FA\05\F6\05\0DF\03)\03\0F\07\FE\05Z\02j\04\15D\03;\07\FE\05j\04Z\02#B\03\05\03\01\03\06\03\03\03\03\06\06#B\03\05\03\01\03\06\03\03\03\03\0E\06\03\06\03\03\03\03\AD%F\03\0D\03\03\05\12\06\16\06#B\03\0F\03\01\03\06\03\03\03\03\1E\06'F\03\0D\03\03\05\1A\06\22\06%F\03\0D\03\03\05\0A\06&\06#B\03\05\03\01\03\06\03\03\03\03.\06\03\06\03\03\03\03+%F\03\0D\03\03\052\066\06#B\03\17\03\01\03\06\03\03\03\03>\06'F\03\0D\03\03\05:\06B\06%F\03\0D\03\03\05*\06F\06#B\03\05\03\01\03\06\03\03\03\03N\06\03\06\03\03\03\03!%F\03\0D\03\03\05R\06V\06#B\03\17\03\01\03\06\03\03\03\03^\06'F\03\0D\03\03\05Z\06b\06%F\03\0D\03\03\05J\06f\06#B\03\05\03\01\03\06\03\03\03\03n\06\03\06\03\03\03\03'%F\03\0D\03\03\05r\06v\06#B\03!\03\01\03\06\03\03\03\03~\06'F\03\0D\03\03\05z\06\82\06%F\03\0D\03\03\05j\06\86\06\07B\03\1F\03\03\03\06\03\03\03\03\B3%F\03\0D\03\03\05\8E\06\92\06#B\03\07\03\01\03\06\03\03\03\03\9A\06'F\03\0D\03\03\05\96\06\9E\06%F\03\0D\03\03\05\8A\06\A2\06\03\06\03\03\1B\03\15\0B\06\03\03\1B\05\AA\06\A6\06\0DF\03)\03\0F\07\AE\06Z\02n\04\15D\03;\07\AE\06n\04Z\02K\00-#B5\17\03\01)F5/\03\11\05-:\02AF\1B\09\03\01\03>\02#B-\05\03\01)F-\1D\03\11\05B\02F\02M\14-\03J\02\09\03\01\05K\00-\03\A2\03R\07\07B?\1F\03\03#B\15!\03\01\03\06\15\03\03\03R\02)F\15\1B\03\17\05N\02V\02\13FA#\03+\03Z\02\05\06\0F\03!\03^\02#B\01\05\03\01\03\06\01\03\07\03f\02#B\01\05\03\01\03\06\01\03\07\03n\02\03\06\01\03\07\03+%F\01\0D\03\07\05r\02v\02#B\01\13\03\01\03\06\01\03\07\03~\02'F\01\0D\03\07\05z\02\82\02%F\01\0D\03\07\05j\02\86\02#B\01\05\03\01\03\06\01\03\07\03\8E\02\03\06\01\03\07\03!%F\01\0D\03\07\05\92\02\96\02#B\01\13\03\01\03\06\01\03\07\03\9E\02'F\01\0D\03\07\05\9A\02\A2\02%F\01\0D\03\07\05\8A\02\A6\02#B\01\05\03\01\03\06\01\03\07\03\AE\02\03\06\01\03\07\03'%F\01\0D\03\07\05\B2\02\B6\02#B\01%\03\01\03\06\01\03\07\03\BE\02'F\01\0D\03\07\05\BA\02\C2\02%F\01\0D\03\07\05\AA\02\C6\02\07B\01\1F\03\03\09F\01\07\03)\03\CE\02\05\06\01\03\07\03\D2\02\03\06\01\03\07\03=%F\01\0D\03\07\05\D6\02\DA\02#B\01\11\03\01\03\06\01\03\07\03\E2\02'F\01\0D\03\07\05\DE\02\E6\02%F\01\0D\03\07\05\CA\02\EA\02\07B\01'\03\0B\09F\01\05\03\19\03\F2\02\05\06\01\03\07\03\F6\02\03\06\01\03\07\03A%F\01\0D\03\07\05\FA\02\FE\02#B\01\07\03\01\03\06\01\03\07\03\06\03'F\01\0D\03\07\05\02\03\0A\03%F\01\0D\03\07\05\EE\02\0E\03\03\06\01\03-\03\05\0B\06\01\03-\05\16\03\12\03#B\01\05\03\01\03\06\01\03\07\03\1E\037F\01\09\03\1D\03\22\03\0DF\01)\03\1D\07\1A\03b\02&\03#B\0F+\03\0D\03\06\0F\03\09\03.\03#B\0F-\03\0D\03\06\0F\03\0F\036\03#B\0F+\03\0D\03\06\0F\03\0F\03>\03#B\11\17\03\01+F\11\0D\03\01\05-F\03#B\11\13\03\01+F\11\0D\03\01\05\02\02N\03#B\0D\07\03\01%F\0D\0D\03\01\05R\03V\03#B\1D\05\03\01-\06\1D\03\01\05Z\03^\03#B\13\07\03\01'F\13\0D\03\01\05J\03f\03#B5\05\03\01)F5/\03\11\05\02\02n\03)F\15\1B\03\11\05\02\02\22\029\06K\03\11\05r\03v\03#B\1B\05\03\01#B1\17\03\01/\061\03\01\07z\03\82\03~\03#B\0D\07\03\01%F\0D\0D\03\01\05j\03\8A\031\069\03\01\05\86\03\8E\03#B!\05\03\01#B!\07\03\01OV!\09\07\09\0F\0F\0Dj\03\92\03\9A\032\03:\03B\03\05\03\86\02\F6\04\09\03!\13!\1F!\1F!\00#B\13\11\03\01'F\13\0D\03\01\05\EE\05\FE\05%F\0D\0D\03\01\05\96\03\02\06\07B?'\03\0B\03\06\0D\03\0B\03\06\06%F\0D\0D\03\0B\05\0E\06\0A\06#B\11\07\03\01+F\11\0D\03\01\05\22\02\16\06#B\1D\05\03\01-\06\1D\03\01\05\1A\06\1E\06#BM\13\03\01C\06M\03\01\05\22\06&\06\03\06\11\03\0B\03*\06+F\11\0D\03\0B\05.\06\12\06#B\11\07\03\01+F\11\0D\03\01\05\22\026\06#B\15\05\03\01\03\06\15\03\0B\03>\06)F\15\1B\03\1F\052\06B\06#B\0D\13\03\01\03\06\0D\03\0B\03J\06%F\0D\0D\03\0B\052\06N\06/\061\03\0B\07F\06R\062\06\03\06\11\03\0B\03:\06+F\11\0D\03\0B\05Z\06V\06\03\06_\03\0B\03\02\02)F_M\03\1F\05^\06b\06\03\065\03\0B\03b\03)F5/\03\1F\05^\06j\069\06K\03\1F\05f\06n\06#B\15\13\03\01\03\06\15\03\0B\03v\06)F\15\1B\03\1F\05\12\06z\069\06K\03\1F\05r\06~\06\13FA#\031\03\82\06\05\06\0F\033\03\86\06#B\01\05\03\01\03\06\01\03\05\03\8E\06#B\01\05\03\01\03\06\01\03\05\03\96\06\03\06\01\03\05\03+%F\01\0D\03\05\05\9A\06\9E\06#B\01=\03\01\03\06\01\03\05\03\A6\06'F\01\0D\03\05\05\A2\06\AA\06%F\01\0D\03\05\05\92\06\AE\06\07B\01'\03\0B\03\06\01\03\0B\03\06\06%F\01\0D\03\0B\05\BA\06\B6\06\09F\01\07\03#\03\BE\06\05\06\01\03\05\03\C2\06\03\06\01\03\05\03a%F\01\0D\03\05\05\C6\06\CA\06#B\01?\03\01\03\06\01\03\05\03\D2\06'F\01\0D\03\05\05\CE\06\D6\06%F\01\0D\03\05\05\B2\06\DA\06#B\01\05\03\01\03\06\01\03\05\03\E2\06\03\06\01\03\05\03'%F\01\0D\03\05\05\E6\06\EA\06#B\01\11\03\01\03\06\01\03\05\03\F2\06'F\01\0D\03\05\05\EE\06\F6\06%F\01\0D\03\05\05\DE\06\FA\06\07B\01'\03\0B\09F\01\05\03\19\03\02\07\05\06\01\03\05\03\06\07\03\06\01\03\05\03e%F\01\0D\03\05\05\0A\07\0E\07#B\01\07\03\01\03\06\01\03\05\03\16\07'F\01\0D\03\05\05\12\07\1A\07%F\01\0D\03\05\05\FE\06\1E\07\03\06\01\03\15\03\0B\0B\06\01\03\15\05&\07\22\07#B\01\05\03\01\03\06\01\03\05\03.\077F\01\09\03\13\032\07\0DF\01)\03\13\07*\07\8A\066\07\09F\0F\05\039\03\82\06\1DFeA\03\13\03:\07#B#+\03\0D\03\06#\03\09\03F\07\17F#C\03\09\07*\03B\07J\07#B\13E\03\0D\03\06\13\03\09\03R\073F\13G\03\09\05N\07V\07#B\1BO\03\0D\05\06\0F\03!\03>\07\03\06\0F\03\09\03^\07/\061\03\09\07b\07Z\07f\07\0FV7\07\03\0F\03j\07\07\04/\03\07\0B\05\1B7\1B7\00;F\1DI\03\0D\05\01\03\11\047\03\05;F\1DI\03\0F\05\F6\05n\07\09F\0F\07\03%\03r\07\05\06\11\03\09\03v\07=F\11G\03\09\05j\07z\07\19FYK\03\09\03~\07=F\11G\03\0F\05\F6\05r\07\19FYK\03\0F\03\86\07\13FA#\031\03\82\06\05\06\0F\033\03\8E\07#B\01\05\03\01\03\06\01\03\05\03\96\07#B\01\05\03\01\03\06\01\03\05\03\9E\07\03\06\01\03\05\03+%F\01\0D\03\05\05\A2\07\A6\07#B\01=\03\01\03\06\01\03\05\03\AE\07'F\01\0D\03\05\05\AA\07\B2\07%F\01\0D\03\05\05\9A\07\B6\07\07B\01'\03\0B\03\06\01\03\0B\03\06\06%F\01\0D\03\0B\05\C2\07\BE\07\09F\01\07\03#\03\C6\07\05\06\01\03\05\03\CA\07\03\06\01\03\05\03m%F\01\0D\03\05\05\CE\07\D2\07#B\01?\03\01\03\06\01\03\05\03\DA\07'F\01\0D\03\05\05\D6\07\DE\07%F\01\0D\03\05\05\BA\07\E2\07#B\01\05\03\01\03\06\01\03\05\03\EA\07\03\06\01\03\05\03'%F\01\0D\03\05\05\EE\07\F2\07#B\01\11\03\01\03\06\01\03\05\03\FA\07'F\01\0D\03\05\05\F6\07\FE\07%F\01\0D\03\05\05\E6\07\02\08\07B\01'\03\0B\09F\01\05\03\19\03\0A\08\05\06\01\03\05\03\0E\08\03\06\01\03\05\03q%F\01\0D\03\05\05\12\08\16\08#B\01\07\03\01\03\06\01\03\05\03\1E\08'F\01\0D\03\05\05\1A\08\22\08%F\01\0D\03\05\05\06\08&\08\03\06\01\03\15\03\0D\0B\06\01\03\15\05.\08*\08#B\01\05\03\01\03\06\01\03\05\036\087F\01\09\03\13\03:\08\0DF\01)\03\13\072\08\92\07>\08\09F\0F\07\03%\03\8A\07\05\06\13\03\09\03F\083F\13G\03\09\05\F2\05J\08EF\1B#\03\1D\03\82\07#B#+\03\0D\03\06#\03\09\03V\08\17F#C\03\09\07R\08B\08Z\085F\0DG\03\09\05N\08^\083F\13G\03\0F\05\FA\05\8A\07\0FV\1F\07\03\0F\03\82\07\07\04/\03\07\0B\05\1B\1F\1B\1F\005F\0DG\03\0D\05\01\03\11\04\1F\03\055F\0DG\03\0F\05f\08j\08K\04!\07b\08r\07n\08\13FA#\03+\03Z\02\05\06\0F\03!\03\AA\03#B\03\05\03\01\03\06\03\03\07\03\B2\03#B\03\05\03\01\03\06\03\03\07\03\BA\03\03\06\03\03\07\03\BF%F\03\0D\03\07\05\BE\03\C2\03#B\03Q\03\01\03\06\03\03\07\03\CA\03'F\03\0D\03\07\05\C6\03\CE\03%F\03\0D\03\07\05\B6\03\D2\03#B\03\05\03\01\03\06\03\03\07\03\DA\03\03\06\03\03\07\03+%F\03\0D\03\07\05\DE\03\E2\03#B\03\13\03\01\03\06\03\03\07\03\EA\03'F\03\0D\03\07\05\E6\03\EE\03%F\03\0D\03\07\05\D6\03\F2\03#B\03\05\03\01\03\06\03\03\07\03\FA\03\03\06\03\03\07\03!%F\03\0D\03\07\05\FE\03\02\04#B\03\13\03\01\03\06\03\03\07\03\0A\04'F\03\0D\03\07\05\06\04\0E\04%F\03\0D\03\07\05\F6\03\12\04#B\03\05\03\01\03\06\03\03\07\03\1A\04\03\06\03\03\07\03'%F\03\0D\03\07\05\1E\04\22\04#B\03%\03\01\03\06\03\03\07\03*\04'F\03\0D\03\07\05&\04.\04%F\03\0D\03\07\05\16\042\04\07B\03\1F\03\03\09F\03\07\03)\03:\04\05\06\03\03\07\03>\04\03\06\03\03\07\03\C7%F\03\0D\03\07\05B\04F\04#B\03\11\03\01\03\06\03\03\07\03N\04'F\03\0D\03\07\05J\04R\04%F\03\0D\03\07\056\04V\04\07B\03'\03\0B\09F\03\05\03\19\03^\04\05\06\03\03\07\03b\04\03\06\03\03\07\03\CB%F\03\0D\03\07\05f\04j\04#B\03\07\03\01\03\06\03\03\07\03r\04'F\03\0D\03\07\05n\04v\04%F\03\0D\03\07\05Z\04z\04\03\06\03\03/\03\17\0B\06\03\03/\05\82\04~\04\0DF\03)\03\09\07\86\04\AE\03\9E\03\15D\03;\07\86\04\9E\03\AE\03#B\03\05\03\01\03\06\03\03\03\03\8E\04#B\03\05\03\01\03\06\03\03\03\03\96\04\03\06\03\03\03\03\D7%F\03\0D\03\03\05\9A\04\9E\04#B\03\0F\03\01\03\06\03\03\03\03\A6\04'F\03\0D\03\03\05\A2\04\AA\04%F\03\0D\03\03\05\92\04\AE\04#B\03\05\03\01\03\06\03\03\03\03\B6\04\03\06\03\03\03\03+%F\03\0D\03\03\05\BA\04\BE\04#B\03\17\03\01\03\06\03\03\03\03\C6\04'F\03\0D\03\03\05\C2\04\CA\04%F\03\0D\03\03\05\B2\04\CE\04#B\03\05\03\01\03\06\03\03\03\03\D6\04\03\06\03\03\03\03!%F\03\0D\03\03\05\DA\04\DE\04#B\03\17\03\01\03\06\03\03\03\03\E6\04'F\03\0D\03\03\05\E2\04\EA\04%F\03\0D\03\03\05\D2\04\EE\04#B\03\05\03\01\03\06\03\03\03\03\F6\04\03\06\03\03\03\03'%F\03\0D\03\03\05\FA\04\FE\04#B\03!\03\01\03\06\03\03\03\03\06\05'F\03\0D\03\03\05\02\05\0A\05%F\03\0D\03\03\05\F2\04\0E\05\07B\03\1F\03\03\03\06\03\03\03\03\DD%F\03\0D\03\03\05\16\05\1A\05#B\03\07\03\01\03\06\03\03\03\03\22\05'F\03\0D\03\03\05\1E\05&\05%F\03\0D\03\03\05\12\05*\05\03\06\03\03\1B\03\19\0B\06\03\03\1B\052\05.\05\0DF\03)\03\0F\076\05Z\02\A2\03\15D\03;\076\05\A2\03Z\02#B\03\05\03\01\03\06\03\03\03\03>\05#B\03\05\03\01\03\06\03\03\03\03F\05\03\06\03\03\03\03\E9%F\03\0D\03\03\05J\05N\05#B\03\0F\03\01\03\06\03\03\03\03V\05'F\03\0D\03\03\05R\05Z\05%F\03\0D\03\03\05B\05^\05#B\03\05\03\01\03\06\03\03\03\03f\05\03\06\03\03\03\03+%F\03\0D\03\03\05j\05n\05#B\03\17\03\01\03\06\03\03\03\03v\05'F\03\0D\03\03\05r\05z\05%F\03\0D\03\03\05b\05~\05#B\03\05\03\01\03\06\03\03\03\03\86\05\03\06\03\03\03\03!%F\03\0D\03\03\05\8A\05\8E\05#B\03\17\03\01\03\06\03\03\03\03\96\05'F\03\0D\03\03\05\92\05\9A\05%F\03\0D\03\03\05\82\05\9E\05#B\03\05\03\01\03\06\03\03\03\03\A6\05\03\06\03\03\03\03'%F\03\0D\03\03\05\AA\05\AE\05#B\03!\03\01\03\06\03\03\03\03\B6\05'F\03\0D\03\03\05\B2\05\BA\05%F\03\0D\03\03\05\A2\05\BE\05\07B\03\1F\03\03\03\06\03\03\03\03\EF%F\03\0D\03\03\05\C6\05\CA\05#B\03\07\03\01\03\06\03\03\03\03\D2\05'F\03\0D\03\03\05\CE\05\D6\05%F\03\0D\03\03\05\C2\05\DA\05\03\06\03\03\1B\03\1B\0B\06\03\03\1B\05\E2\05\DE\05\0DF\03)\03\0F\07\E6\05Z\02\A6\03\15D\03;\07\E6\05\A6\03Z\02K\00-!\00\09\06\03\01\05\01\00F\10\DB\07\09\07\09\09\0B\17\1935\17\19\19\1B\15\17\07\09\09\0B\19\1B\0D\0F\13\15\09\0B\09\0B\19\1B#%\13\0B\0D\07\09\0B\0D\07\09\09\0B\09\0B\09\0B\09\0B+-\0F\19O\19\09\0B\0F!?%\0B7\09\07\0D\0D\0D\0F\0D\0D\0D\0B\11\0B\0F\0B\0B\0D\0F\0D\0B\0B\0B\0B\13\0F\0B\0D\1F/\09\0D\11\1D\0F\0B\0F\19\17\15\0D\0F\09\0D\07\11builtin\00tt\00arith\00scf\00module\00splat\00broadcast\00make_range\00expand_dims\00addptr\00load\00reduce\00reduce.return\00reshape\00store\00dot\00elementwise_inline_asm\00get_program_id\00trans\00func\00return\00constant\00addi\00muli\00cmpi\00subi\00maxsi\00select\00minsi\00mulf\00addf\00uitofp\00andi\00maxnumf\00subf\00divsi\00extui\00remsi\00truncf\00remui\00divui\00yield\00if\00for\00ex2.approx.ftz.f32 $0, $1;\00=f,f\00nsa_decode_blocks\00/work/main/nsa_jax/dispatch.py\00tt.divisibility\00public\00sub:\00sub\00by_platform\00/work/main/pallas_kernels/platforms.py\00_attend_fwd\00attend\00convert_element_type:\00convert_element_type\00max:\00max\00min:\00min\00get:\00get\00add:\00add\00lt:\00lt\00cond:\00cond\00ge:\00ge\00iota:\00iota\00reshape:\00broadcast_in_dim:\00broadcast_in_dim\00masked_load:\00masked_load\00mul:\00mul\00and:\00and\00select_n:\00select_n\00while:\00while\00masked_swap:\00masked_swap\00rem:\00rem\00le:\00le\00transpose:\00transpose\00dot_general:\00dot_general\00reduce_max:\00reduce_max\00elementwise_inline_asm_p:\00elementwise_inline_asm_p\00reduce_sum:\00reduce_sum\00div:\00div\00gt:\00gt\00eq:\00eq\00\08\E9S\05\D3\01\0D\F7\7F\01i\06\02\03\05\03\07\03\01\03k\05\F6\03\03\17\03\0B\03'\03C\03+\0D\0F\0FK\07\01\03\033\03E\05\17\05\03I\05\01\01\03]\05\0B\05\0F\0F\0FK\0D\03\03\03\03;\03o\03G\05r\02\03w\05\82\02\05\92\02\03a\07\0F\0F\01\03O\03Q\03c\05\0B\0B\03g\07\FE\03\01\05\FE\03\09SU\07W\03s\03u\03q", name = "nsa_decode_blocks", num_stages = 3 : i32, num_warps = 4 : i32}, operand_layouts = [dense<0> : tensor<1xindex>, dense<0> : tensor<1xindex>, dense<[4, 3, 2, 1, 0]> : tensor<5xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[3, 2, 1, 0]> : tensor<4xindex>], result_layouts = [dense<[3, 2, 1, 0]> : tensor<4xindex>, dense<[5, 4, 3, 2, 1, 0]> : tensor<6xindex>, dense<[4, 3, 2, 1, 0]> : tensor<5xindex>, dense<[4, 3, 2, 1, 0]> : tensor<5xindex>, dense<[5, 4, 3, 2, 1, 0]> : tensor<6xindex>, dense<[4, 3, 2, 1, 0]> : tensor<5xindex>, dense<[4, 3, 2, 1, 0]> : tensor<5xindex>]} : (tensor<2xi32>, tensor<2xi32>, tensor<2x1x2x4x64xbf16>, tensor<2x512x2x64xbf16>, tensor<2x512x2x64xbf16>, tensor<2x512x2x64xbf16>, tensor<2x512x2x64xbf16>) -> (tensor<2x1x2x16xi32>, tensor<8x2x1x2x4x64xf32>, tensor<8x2x1x2x4xf32>, tensor<8x2x1x2x4xf32>, tensor<8x2x1x2x4x64xf32>, tensor<8x2x1x2x4xf32>, tensor<8x2x1x2x4xf32>)
    %373 = stablehlo.reshape %372#1 : (tensor<8x2x1x2x4x64xf32>) -> tensor<8x16x64xf32>
    %374 = stablehlo.reshape %372#2 : (tensor<8x2x1x2x4xf32>) -> tensor<8x16xf32>
    %375 = stablehlo.reshape %372#3 : (tensor<8x2x1x2x4xf32>) -> tensor<8x16xf32>
    %376 = stablehlo.reshape %372#4 : (tensor<8x2x1x2x4x64xf32>) -> tensor<8x16x64xf32>
    %377 = stablehlo.reshape %372#5 : (tensor<8x2x1x2x4xf32>) -> tensor<8x16xf32>
    %378 = stablehlo.reshape %372#6 : (tensor<8x2x1x2x4xf32>) -> tensor<8x16xf32>
    %379 = stablehlo.reshape %14 : (tensor<2x1x8x3xf32>) -> tensor<16x3xf32>
    %380 = stablehlo.custom_call @__gpu$xla.gpu.triton(%379, %370#0, %370#1, %370#2, %373, %374, %375, %376, %377, %378) {backend_config = "", mhlo.backend_config = {debug = false, grid_x = 16 : i32, grid_y = 1 : i32, grid_z = 1 : i32, ir = "ML\EFR\0DMLIR23.0.0git\00\01M\07\01\05\097\01\03\0F\03\1B\13\17\1B\1F#'+/37;?C\05\1BGKOSW[_cgkosw\036\02\CD;\01\C9\0F\0F\0F\07\0F\0F\0F\0F\0F\0F\0F\13\0F\0F\13\0F\0F\0F\0F\0F\0F\0F\0F\0F\0F\13\0B\0B\0F\0F\0F\1F\0F\0B\0B7\0B\0F\0B\0B\0B\0F\0B\0F\0B\1F\0B\0F\0F\0B'\0F\0B\1F\0B\0F\0B\0F\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\0B\0F\0B\05\05YY\017\0F\07\13\1B\13\17\1B\17\13\0B\13\13\1B\13\1B\17\1B\1B\17\17\17\17;\17\0F\17\07\03\0559\02\9A\07\1Dmo\11\01\01\11\01\05\1F\1DQS\1D\93\95\1D\8D\8F\1D\BD\BF\15W_\1D\A5\A7\11\13\00\11\01\02\02\11\01!\1D{}\03\03IK\1D\AB\AD\1Duw\1D\B7\B9\11\01A\1D\81\83\1D\99\9B\1D\B1\B3\11\01\0D\13\03\01\1D\9F\A1\11\01\02 \05=\05?\11\13\01\1D\87\89\1115\13\03\10\00\00\E0\0F\1D\C3\C5\05A\05C\01\17\1D\1D\1D\1D\1D\1D\1D\1D\1D\1D\1D\05E\11\01\81\0D-\05G\05I\1DU\11\05K\1DY[\05M-]\09c\19q\07\05O\15ag\1Dce\05Q-E\09\D6\03\17\EE\03\07\1Dik\05S-E\07\C2\03\13S\05U\1Dq\11\05W\11\01\09\05Y\1Dy\11\05[\05]\1D\7F\11\05_\05a\1D\85\11\05c\05e\1D\8B\11\05g\05i\1D\91\11\05k\05m\1D\97\11\05o\05q\1D\9D\11\05s\05u\1D\A3\11\05w\05y\1D\A9\11\05{\05}\1D\AF\11\05\7F\05\81\1D\B5\11\05\83\05\85\1D\BB\11\05\87\05\89\1D\C1\11\05\8B\05\8D\1D\C7\11\05\8F#arith.overflow<none>\00#arith.fastmath<none>\00\01\02\02\0B\1B\03!\01\1B\05!\02\02\01\1B\03\05\01\1B\03\02\02\03\1B\05\05\02\02\01\1B\03\02\02\01\1B\03!\03\01\09\1B\03!7\1B\03\05\03\1B\05!\02\02\03\1B\03\057\1B\05!\02\027\1B\03\02\02\13\1B\05\05\02\02\03\1B\05\05\02\027\1B\05!\05\01\1B\05!\05\03\1B\03\02\025\1B\03\02\029\05\1777777777779\01\1B\05\05\05\01\01\02\04\1B\05\05\05\03\07!tt.ptr<f32>\00!tt.ptr<bf16>\00\04\CE8\05\01P\07\01\07\04\AA8\03\01\05\15P\07\03\07\04~8\03\8A\06\CE\0C\17mmmmmmmmmmq\00\17B\07\05\03\01\1DB\07\05\03\01\1DB\07\07\03\01!F\07\09\03\01\05\19\1B\1DB\07\05\03\01\1DB\07\05\03\01\1DB\07\0B\03\01!F\07\09\03\01\05\1F#\1DB\07\0D\03\01!F\07\09\03\01\05!'\1DB\07\05\03\01\1DB\07\0B\03\01!F\07\09\03\01\05+-\1DB\07\05\03\01\1DB\07\0B\03\01!F\07\09\03\01\0513\1DB\07\05\03\01\1DB\07\05\03\01\1DB\07\0F\03\01!F\07\09\03\01\057;\1DB\07\0D\03\01!F\07\09\03\01\059?\1DB\07\05\03\01\1DB\07\0F\03\01!F\07\09\03\01\05CE\1DB\07\05\03\01\1DB\07\0F\03\01!F\07\09\03\01\05IK\1DB\07\05\03\01\1DB\07\05\03\01\1DB\07\0F\03\01!F\07\09\03\01\05OS\1DB\07\0D\03\01!F\07\09\03\01\05QW\1DB\07\05\03\01\1DB\07\0F\03\01!F\07\09\03\01\05[]\1DB\07\05\03\01\1DB\07\0F\03\01!F\07\09\03\01\05ac\1DB\07\05\03\01\1DB\07\0D\03\01!F\07\09\03\01\05gi\1DB\09\05\03\01\1DB\09\05\03\01\1FF\09\09\03\01\05o\17\1DB\09\07\03\01!F\09\09\03\01\05qs\1FF\09\09\03\01\05mu\1DB\09\05\03\01\1FF\09\09\03\01\05y\1D\1DB\09\0B\03\01!F\09\09\03\01\05{}\1FF\09\09\03\01\05w\7F\05\06\09\037\05\01\81\07F\09\11\03\03\03\83\1DB\01\05\03\01\03\06\01\03\09\03\87\09B\01\13\03\09\03\06\01\03\09\03/\1FF\01\09\03\09\05\8B\8D\1DB\01\15\03\01\03\06\01\03\09\03\91!F\01\09\03\09\05\8F\93\1FF\01\09\03\09\05\89\95\1DB\01\05\03\01\03\06\01\03\09\03\99\03\06\01\03\09\03\17\1FF\01\09\03\09\05\9B\9D\1DB\01\0B\03\01\03\06\01\03\09\03\A1!F\01\09\03\09\05\9F\A3\1FF\01\09\03\09\05\97\A5\03\06\01\03\1B\03\05\05\06\01\03\1B\05\A9\A7\07F\01\11\03\17\03\AB\1DB\01\05\03\01\03\06\01\03\09\03\AF\09B\01\13\03\09\03\06\01\03\09\035\1FF\01\09\03\09\05\B3\B5\1DB\01\15\03\01\03\06\01\03\09\03\B9!F\01\09\03\09\05\B7\BB\1FF\01\09\03\09\05\B1\BD\1DB\01\05\03\01\03\06\01\03\09\03\C1\03\06\01\03\09\03\17\1FF\01\09\03\09\05\C3\C5\1DB\01\0B\03\01\03\06\01\03\09\03\C9!F\01\09\03\09\05\C7\CB\1FF\01\09\03\09\05\BF\CD\03\06\01\03\1B\03\07\05\06\01\03\1B\05\D1\CF\07F\01\11\03\17\03\D3\1DB\01\05\03\01\03\06\01\03\0D\03\D7\09B\01\13\03\09\0BF\01\0B\03/\03\DB\11\06\01\03\0D\03\DD\03\06\01\03\0D\03%\1FF\01\09\03\0D\05\DF\E1\1DB\01\17\03\01\03\06\01\03\0D\03\E5!F\01\09\03\0D\05\E3\E7\1FF\01\09\03\0D\05\D9\E9\1DB\01\05\03\01\03\06\01\03\0D\03\ED\03\06\01\03\0D\03\17\1FF\01\09\03\0D\05\EF\F1\1DB\01\0D\03\01\03\06\01\03\0D\03\F5!F\01\09\03\0D\05\F3\F7\1FF\01\09\03\0D\05\EB\F9\09B\01\19\03\0F\0BF\01\05\03\0D\03\FD\03\06\01\03\0D\03)\1FF\01\09\03\0D\05\FF\02\02\1DB\01\0B\03\01\03\06\01\03\0D\03\0A\02!F\01\09\03\0D\05\06\02\0E\02\1FF\01\09\03\0D\05\FB\12\02\03\06\01\03#\03\03\05\06\01\03#\05\1A\02\16\02\07F\01\11\03!\03\1E\02\1DB\09\05\03\01\1DB\09\05\03\01\1FF\09\09\03\01\05*\02\17\1DB\09\07\03\01!F\09\09\03\01\05.\022\02\1FF\09\09\03\01\05&\026\02\1DB\09\0B\03\01\1FF\09\09\03\01\05>\02\1D\1DB\09\0B\03\01!F\09\09\03\01\05B\02F\02\1FF\09\09\03\01\05:\02J\02\05\06\09\037\05\01N\02\07F\09\11\03\03\03R\02\1DB\01\05\03\01\03\06\01\03\05\03Z\02\09B\01\1B\03\05\03\06\01\03\05\03G\1FF\01\09\03\05\05b\02f\02\1DB\01\15\03\01\03\06\01\03\05\03n\02!F\01\09\03\05\05j\02r\02\1FF\01\09\03\05\05^\02v\02\1DB\01\05\03\01\03\06\01\03\05\03~\02\03\06\01\03\05\03\17\1FF\01\09\03\05\05\82\02\86\02\1DB\01\0B\03\01\03\06\01\03\05\03\8E\02!F\01\09\03\05\05\8A\02\92\02\1FF\01\09\03\05\05z\02\96\02\03\06\01\03\15\03\0B\05\06\01\03\15\05\9E\02\9A\02\07F\01\11\03\11\03\A2\02\1DB\01\05\03\01\03\06\01\03\05\03\AA\02\09B\01\1B\03\05\03\06\01\03\05\03M\1FF\01\09\03\05\05\B2\02\B6\02\1DB\01\15\03\01\03\06\01\03\05\03\BE\02!F\01\09\03\05\05\BA\02\C2\02\1FF\01\09\03\05\05\AE\02\C6\02\1DB\01\05\03\01\03\06\01\03\05\03\CE\02\03\06\01\03\05\03\17\1FF\01\09\03\05\05\D2\02\D6\02\1DB\01\0B\03\01\03\06\01\03\05\03\DE\02!F\01\09\03\05\05\DA\02\E2\02\1FF\01\09\03\05\05\CA\02\E6\02\03\06\01\03\15\03\0D\05\06\01\03\15\05\EE\02\EA\02\07F\01\11\03\11\03\F2\02\1DB\01\05\03\01\03\06\01\03\07\03\FA\02\09B\01\1B\03\05\0BF\01\0B\03%\03\02\03\11\06\01\03\07\03\06\03\03\06\01\03\07\03=\1FF\01\09\03\07\05\0A\03\0E\03\1DB\01\17\03\01\03\06\01\03\07\03\16\03!F\01\09\03\07\05\12\03\1A\03\1FF\01\09\03\07\05\FE\02\1E\03\1DB\01\05\03\01\03\06\01\03\07\03&\03\03\06\01\03\07\03\17\1FF\01\09\03\07\05*\03.\03\1DB\01\0D\03\01\03\06\01\03\07\036\03!F\01\09\03\07\052\03:\03\1FF\01\09\03\07\05\22\03>\03\09B\01\19\03\0F\0BF\01\05\03\0D\03F\03\11\06\01\03\07\03J\03\03\06\01\03\07\03A\1FF\01\09\03\07\05N\03R\03\1DB\01\0B\03\01\03\06\01\03\07\03Z\03!F\01\09\03\07\05V\03^\03\1FF\01\09\03\07\05B\03b\03\03\06\01\03\1D\03\09\05\06\01\03\1D\05j\03f\03\07F\01\11\03\19\03n\03\1DB\09\05\03\01\1DB\09\05\03\01\1FF\09\09\03\01\05z\03\17\1DB\09\07\03\01!F\09\09\03\01\05~\03\82\03\1FF\09\09\03\01\05v\03\86\03\1DB\09\1D\03\01\1FF\09\09\03\01\05\8E\03\1D\1DB\09\0B\03\01!F\09\09\03\01\05\92\03\96\03\1FF\09\09\03\01\05\8A\03\9A\03\05\06\09\037\05\01\9E\03\07F\09\11\03\03\03\A2\03\1DB\01\05\03\01\03\06\01\03\05\03\AA\03\09B\01\1B\03\05\03\06\01\03\05\03_\1FF\01\09\03\05\05\B2\03\B6\03\1DB\01\15\03\01\03\06\01\03\05\03\BE\03!F\01\09\03\05\05\BA\03\C2\03\1FF\01\09\03\05\05\AE\03\C6\03\1DB\01\05\03\01\03\06\01\03\05\03\CE\03\03\06\01\03\05\03\17\1FF\01\09\03\05\05\D2\03\D6\03\1DB\01\0B\03\01\03\06\01\03\05\03\DE\03!F\01\09\03\05\05\DA\03\E2\03\1FF\01\09\03\05\05\CA\03\E6\03\03\06\01\03\15\03\11\05\06\01\03\15\05\EE\03\EA\03\07F\01\11\03\11\03\F2\03\1DB\01\05\03\01\03\06\01\03\05\03\FA\03\09B\01\1B\03\05\03\06\01\03\05\03e\1FF\01\09\03\05\05\02\04\06\04\1DB\01\15\03\01\03\06\01\03\05\03\0E\04!F\01\09\03\05\05\0A\04\12\04\1FF\01\09\03\05\05\FE\03\16\04\1DB\01\05\03\01\03\06\01\03\05\03\1E\04\03\06\01\03\05\03\17\1FF\01\09\03\05\05\22\04&\04\1DB\01\0B\03\01\03\06\01\03\05\03.\04!F\01\09\03\05\05*\042\04\1FF\01\09\03\05\05\1A\046\04\03\06\01\03\15\03\13\05\06\01\03\15\05>\04:\04\07F\01\11\03\11\03B\04\1DB\01\05\03\01\03\06\01\03\07\03J\04\09B\01\1B\03\05\0BF\01\0B\03%\03R\04\11\06\01\03\07\03V\04\03\06\01\03\07\03U\1FF\01\09\03\07\05Z\04^\04\1DB\01\17\03\01\03\06\01\03\07\03f\04!F\01\09\03\07\05b\04j\04\1FF\01\09\03\07\05N\04n\04\1DB\01\05\03\01\03\06\01\03\07\03v\04\03\06\01\03\07\03\17\1FF\01\09\03\07\05z\04~\04\1DB\01\0D\03\01\03\06\01\03\07\03\86\04!F\01\09\03\07\05\82\04\8A\04\1FF\01\09\03\07\05r\04\8E\04\09B\01\19\03\0F\0BF\01\05\03\0D\03\96\04\11\06\01\03\07\03\9A\04\03\06\01\03\07\03Y\1FF\01\09\03\07\05\9E\04\A2\04\1DB\01\0B\03\01\03\06\01\03\07\03\AA\04!F\01\09\03\07\05\A6\04\AE\04\1FF\01\09\03\07\05\92\04\B2\04\03\06\01\03\1D\03\0F\05\06\01\03\1D\05\BA\04\B6\04\07F\01\11\03\19\03\BE\04\1DB!\1F\03\03\03\06!\03\0B\03\C6\04\0DV\1B\05\03\03\03\AD\07\04/\03\07\0B\05\07\1B\07\1B\003FA!\03\03\05\01\03\0F\04\1B\03\05\03\06'\03\17\03\CE\04+F'#\03\17\05\AD\D2\04\13F;%\03\17\03\D6\04#F\0D#\03\17\05\DA\04\D5\0DV\0B\05\03\03\03\DE\04\07\04/\03\07\0B\05\07\0B\07\0B\00%F##\03\03\05\01\03\0F\04\0B\03\05\1DB)\1F\03\03-F)'\03\13\05\E2\04\E6\04\1DB1)\03\13/\061\03\13\05\EE\04\EA\04\1DB\13\0B\03\01'\06\13\03\03\03\F6\04)\06\1F\03\03\07\EA\04\E2\04\FA\04\1DB++\03\031F+#\03\03\05\02\05\FE\04\0BF!\0B\033\03\DA\04\11\06\0D\03!\03\0A\05#F\0D#\03!\05\0E\05\22\02\0DV\0B\05\03\0B\03\12\05\07\04/\03\07\0B\05\07\0B\07\0B\00%F##\03\03\05\01\03\0F\04\0B\03\05\03\06\0D\03\0B\03\06\05#F\0D#\03\0B\05\16\05\1A\05\1DB\13\05\03\01'\06\13\03\03\03\22\05\03\06!\03\0B\03&\05\03\06\1F\03\1F\03\EA\04)\06\1F\03\0B\07.\05\1E\05*\05\03\06\0D\03\0B\03\85#F\0D#\03\0B\056\052\05%F##\03\0B\05\CA\04:\05\0DV\1B\05\03\03\03\A6\02\07\04/\03\07\0B\05\07\1B\07\1B\003FA!\03\03\05\01\03\0F\04\1B\03\05\03\06'\03\11\03B\05+F'#\03\11\05\A6\02F\05\13F;%\03\11\03J\05#F\0D#\03\11\05N\05\F6\02\0DV\0B\05\03\03\03R\05\07\04/\03\07\0B\05\07\0B\07\0B\00%F##\03\03\05\01\03\0F\04\0B\03\05\1DB)\1F\03\03-F)'\03\13\05V\05Z\05/\061\03\13\05\F2\04^\05\1DB\13\0B\03\01'\06\13\03\03\03f\05)\06\1F\03\03\07^\05V\05j\05\1DB++\03\031F+#\03\03\05r\05n\05\0BF!\0B\03'\03N\05\11\06\0D\03\19\03z\05#F\0D#\03\19\05~\05r\03\0DV\0B\05\03\0B\03\82\05\07\04/\03\07\0B\05\07\0B\07\0B\00%F##\03\03\05\01\03\0F\04\0B\03\05\03\06\0D\03\0B\03v\05#F\0D#\03\0B\05\86\05\8A\05\1DB\13\05\03\01'\06\13\03\03\03\92\05\03\06!\03\0B\03\96\05\03\06\1F\03\1F\03^\05)\06\1F\03\0B\07\9E\05\8E\05\9A\05\03\06\0D\03\0B\03V\02#F\0D#\03\0B\05\A6\05\A2\05%F##\03\0B\05>\05\AA\05\0DV\1B\05\03\03\03\F6\03\07\04/\03\07\0B\05\07\1B\07\1B\003FA!\03\03\05\01\03\0F\04\1B\03\05\03\06'\03\11\03\B2\05+F'#\03\11\05\F6\03\B6\05\13F;%\03\11\03\BA\05#F\0D#\03\11\05\BE\05F\04\0DV\0B\05\03\03\03\C2\05\07\04/\03\07\0B\05\07\0B\07\0B\00%F##\03\03\05\01\03\0F\04\0B\03\05\1DB)\1F\03\03-F)'\03\13\05\C6\05\CA\05/\061\03\13\05b\05\CE\05\1DB\13\0B\03\01'\06\13\03\03\03\D6\05)\06\1F\03\03\07\CE\05\C6\05\DA\05\1DB++\03\031F+#\03\03\05\E2\05\DE\05\0BF!\0B\03'\03\BE\05\11\06\0D\03\19\03\EA\05#F\0D#\03\19\05\EE\05\C2\04\0DV\0B\05\03\0B\03\F2\05\07\04/\03\07\0B\05\07\0B\07\0B\00%F##\03\03\05\01\03\0F\04\0B\03\05\03\06\0D\03\0B\03\E6\05#F\0D#\03\0B\05\F6\05\FA\05\1DB\13\05\03\01'\06\13\03\03\03\02\06\03\06!\03\0B\03\06\06\03\06\1F\03\1F\03\CE\05)\06\1F\03\0B\07\0E\06\FE\05\0A\06\03\06\0D\03\0B\03\A6\03#F\0D#\03\0B\05\16\06\12\06%F##\03\0B\05\AE\05\1A\06\1DB\13\05\03\01'\06\13\03\03\03\22\06\03\06!\03\0B\03&\06\03\06\1F\03\1F\03\D2\05)\06\1F\03\0B\07.\06\1E\06*\065F\13-\03)\032\06\1DB\0F\05\03\01\03\06\0F\03\0F\03:\06\1DB\0F\05\03\01\03\06\0F\03\0F\03B\06\03\06\0F\03\0F\03\17\1FF\0F\09\03\0F\05F\06J\06\1DB\0F\0D\03\01\03\06\0F\03\0F\03R\06!F\0F\09\03\0F\05N\06V\06\1FF\0F\09\03\0F\05>\06Z\06\09B\0F\19\03\0F\03\06\0F\03\0F\03k\1FF\0F\09\03\0F\05b\06f\06\1DB\0F\0B\03\01\03\06\0F\03\0F\03n\06!F\0F\09\03\0F\05j\06r\06\1FF\0F\09\03\0F\05^\06v\06\03\06\0F\03+\03\15\05\06\0F\03+\05~\06z\06\07F\0F\11\03)\03\82\06\19D\0F/\05\82\066\06\1B\00\07\06\03\01\05\01\00\16\0C\91\09\0B\0B\0D\09\0B\09\0B\13\15+-\07\09\07\09\17\19\09\0B35\09\0B\17\19#%\19\1B\0F\19O\19\09\0B\0F!?#\0B7\0F\11\0B\09\0B\0B\0F\0F\0B\0B\0B\0B\13\0F\0D\1F\0B/\15\1D\0F\19\17\0B\0F\0D\0F\0D\07\11builtin\00tt\00arith\00module\00splat\00addptr\00load\00make_range\00expand_dims\00reduce\00reduce.return\00broadcast\00elementwise_inline_asm\00func\00get_program_id\00store\00return\00constant\00addi\00muli\00mulf\00addf\00sitofp\00select\00subf\00cmpf\00ori\00divf\00maxnumf\00truncf\00ex2.approx.ftz.f32 $0, $1;\00=f,f\00nsa_decode_merge\00/work/main/nsa_jax/dispatch.py\00tt.divisibility\00public\00get:\00get\00by_platform\00/work/main/pallas_kernels/platforms.py\00_attend_fwd\00attend\00masked_load:\00masked_load\00broadcast_in_dim:\00broadcast_in_dim\00reduce_max:\00reduce_max\00sub:\00sub\00elementwise_inline_asm_p:\00elementwise_inline_asm_p\00mul:\00mul\00reduce_sum:\00reduce_sum\00ne:\00ne\00or:\00or\00convert_element_type:\00convert_element_type\00select_n:\00select_n\00div:\00div\00add:\00add\00swap:\00swap\00max:\00max\00\08\951\05\87\01\0B\8FM\01C\9F\03\03\03-\05&\03\03\05\03\17\03\19\0D\0B\0B+\07\01\03\05\05\03\03%\033\05\17\03\05\19\03\03s\03/\05.\03\07.\03\01\0957\059\07.\03=\03\15\03?\05\01\01\07\0B\0B\01", name = "nsa_decode_merge", num_stages = 1 : i32, num_warps = 1 : i32}, operand_layouts = [dense<[1, 0]> : tensor<2xindex>, dense<[2, 1, 0]> : tensor<3xindex>, dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>, dense<[2, 1, 0]> : tensor<3xindex>, dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>, dense<[2, 1, 0]> : tensor<3xindex>, dense<[1, 0]> : tensor<2xindex>, dense<[1, 0]> : tensor<2xindex>], result_layouts = [dense<[1, 0]> : tensor<2xindex>]} : (tensor<16x3xf32>, tensor<1x16x64xf32>, tensor<1x16xf32>, tensor<1x16xf32>, tensor<8x16x64xf32>, tensor<8x16xf32>, tensor<8x16xf32>, tensor<8x16x64xf32>, tensor<8x16xf32>, tensor<8x16xf32>) -> tensor<16x64xbf16>
    %381 = stablehlo.reshape %380 : (tensor<16x64xbf16>) -> tensor<2x1x8x64xbf16>
    %382 = stablehlo.iota dim = 0 : tensor<1xi32>
    %383 = stablehlo.broadcast_in_dim %382, dims = [1] : (tensor<1xi32>) -> tensor<1x1xi32>
    %384 = stablehlo.broadcast_in_dim %0, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %385 = stablehlo.broadcast_in_dim %383, dims = [0, 1] : (tensor<1x1xi32>) -> tensor<2x1xi32>
    %386 = stablehlo.compare LT, %385, %384, SIGNED : (tensor<2x1xi32>, tensor<2x1xi32>) -> tensor<2x1xi1>
    %387 = stablehlo.reshape %386 : (tensor<2x1xi1>) -> tensor<2x1x1x1xi1>
    %c_48 = stablehlo.constant dense<0> : tensor<i32>
    %388 = call @_where_5(%387, %381, %c_48) : (tensor<2x1x1x1xi1>, tensor<2x1x8x64xbf16>, tensor<i32>) -> tensor<2x1x8x64xbf16>
    %389 = stablehlo.dot_general %388, %arg24, contracting_dims = [2, 3] x [0, 1], precision = [DEFAULT, DEFAULT] : (tensor<2x1x8x64xbf16>, tensor<8x64x256xbf16>) -> tensor<2x1x256xbf16>
    %390 = stablehlo.iota dim = 0 : tensor<1xi32>
    %391 = stablehlo.broadcast_in_dim %390, dims = [1] : (tensor<1xi32>) -> tensor<1x1xi32>
    %c_49 = stablehlo.constant dense<0> : tensor<i32>
    %392 = stablehlo.broadcast_in_dim %c_49, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %393 = stablehlo.compare GT, %arg8, %392, SIGNED : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %394 = stablehlo.compare LT, %arg8, %arg9, SIGNED : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %395 = stablehlo.and %393, %394 : tensor<2xi1>
    %396 = stablehlo.compare NE, %arg8, %arg8, SIGNED : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %397 = stablehlo.or %395, %396 : tensor<2xi1>
    %398 = stablehlo.broadcast_in_dim %397, dims = [0] : (tensor<2xi1>) -> tensor<2x1xi1>
    %399 = stablehlo.broadcast_in_dim %arg8, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %400 = stablehlo.broadcast_in_dim %391, dims = [0, 1] : (tensor<1x1xi32>) -> tensor<2x1xi32>
    %401 = stablehlo.add %399, %400 : tensor<2x1xi32>
    %c_50 = stablehlo.constant dense<512> : tensor<i32>
    %402 = stablehlo.broadcast_in_dim %c_50, dims = [] : (tensor<i32>) -> tensor<2x1xi32>
    %403 = stablehlo.compare GE, %401, %402, SIGNED : (tensor<2x1xi32>, tensor<2x1xi32>) -> tensor<2x1xi1>
    %404 = stablehlo.or %398, %403 : tensor<2x1xi1>
    %405 = stablehlo.broadcast_in_dim %0, dims = [0] : (tensor<2xi32>) -> tensor<2x1xi32>
    %406 = stablehlo.broadcast_in_dim %391, dims = [0, 1] : (tensor<1x1xi32>) -> tensor<2x1xi32>
    %407 = stablehlo.compare LT, %406, %405, SIGNED : (tensor<2x1xi32>, tensor<2x1xi32>) -> tensor<2x1xi1>
    %408 = stablehlo.and %404, %407 : tensor<2x1xi1>
    %409 = stablehlo.broadcast_in_dim %408, dims = [0, 1] : (tensor<2x1xi1>) -> tensor<2x1x1xi1>
    %cst_51 = stablehlo.constant dense<0x7FC00000> : tensor<f32>
    %410 = call @_where_6(%409, %cst_51, %389) : (tensor<2x1x1xi1>, tensor<f32>, tensor<2x1x256xbf16>) -> tensor<2x1x256xbf16>
    return %410, %125, %129, %329, %333, %147, %151, %351, %355, %108, %368 : tensor<2x1x256xbf16>, tensor<2x512x2x64xbf16>, tensor<2x512x2x64xbf16>, tensor<2x31x2x64xbf16>, tensor<2x31x2x64xbf16>, tensor<2x512x2x64xbf16>, tensor<2x512x2x64xbf16>, tensor<2x32x2x64xbf16>, tensor<2x32x2x64xbf16>, tensor<2xi32>, tensor<2xi32>
  }
  func.func private @_where(%arg0: tensor<2xi1>, %arg1: tensor<2xi32>, %arg2: tensor<i32>) -> tensor<2xi32> {
    %0 = stablehlo.convert %arg2 : tensor<i32>
    %1 = stablehlo.broadcast_in_dim %0, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %2 = stablehlo.select %arg0, %arg1, %1 : tensor<2xi1>, tensor<2xi32>
    return %2 : tensor<2xi32>
  }
  func.func private @clip(%arg0: tensor<2xi32>, %arg1: tensor<i32>, %arg2: tensor<i32>) -> tensor<2xi32> {
    %0 = stablehlo.convert %arg2 : tensor<i32>
    %1 = stablehlo.broadcast_in_dim %0, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %2 = stablehlo.maximum %1, %arg0 : tensor<2xi32>
    %3 = stablehlo.convert %arg1 : tensor<i32>
    %4 = stablehlo.broadcast_in_dim %3, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %5 = stablehlo.minimum %4, %2 : tensor<2xi32>
    return %5 : tensor<2xi32>
  }
  func.func private @_where_0(%arg0: tensor<2x1xi1>, %arg1: tensor<2x1xi32>, %arg2: tensor<1xi32>) -> tensor<2x1xi32> {
    %0 = stablehlo.broadcast_in_dim %arg2, dims = [1] : (tensor<1xi32>) -> tensor<2x1xi32>
    %1 = stablehlo.select %arg0, %arg1, %0 : tensor<2x1xi1>, tensor<2x1xi32>
    return %1 : tensor<2x1xi32>
  }
  func.func private @remainder(%arg0: tensor<2x1xi32>, %arg1: tensor<i32>) -> tensor<2x1xi32> {
    %0 = stablehlo.convert %arg1 : tensor<i32>
    %c = stablehlo.constant dense<0> : tensor<i32>
    %1 = stablehlo.compare EQ, %0, %c, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>
    %c_0 = stablehlo.constant dense<1> : tensor<i32>
    %2 = call @_where_1(%1, %c_0, %0) : (tensor<i1>, tensor<i32>, tensor<i32>) -> tensor<i32>
    %3 = stablehlo.broadcast_in_dim %2, dims = [] : (tensor<i32>) -> tensor<2x1xi32>
    %4 = stablehlo.remainder %arg0, %3 : tensor<2x1xi32>
    %c_1 = stablehlo.constant dense<0> : tensor<i32>
    %5 = stablehlo.broadcast_in_dim %c_1, dims = [] : (tensor<i32>) -> tensor<2x1xi32>
    %6 = stablehlo.compare NE, %4, %5, SIGNED : (tensor<2x1xi32>, tensor<2x1xi32>) -> tensor<2x1xi1>
    %c_2 = stablehlo.constant dense<0> : tensor<i32>
    %7 = stablehlo.broadcast_in_dim %c_2, dims = [] : (tensor<i32>) -> tensor<2x1xi32>
    %8 = stablehlo.compare LT, %4, %7, SIGNED : (tensor<2x1xi32>, tensor<2x1xi32>) -> tensor<2x1xi1>
    %c_3 = stablehlo.constant dense<0> : tensor<i32>
    %9 = stablehlo.compare LT, %2, %c_3, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>
    %10 = stablehlo.broadcast_in_dim %9, dims = [] : (tensor<i1>) -> tensor<2x1xi1>
    %11 = stablehlo.compare NE, %8, %10, UNSIGNED : (tensor<2x1xi1>, tensor<2x1xi1>) -> tensor<2x1xi1>
    %12 = stablehlo.and %11, %6 : tensor<2x1xi1>
    %13 = stablehlo.broadcast_in_dim %2, dims = [] : (tensor<i32>) -> tensor<2x1xi32>
    %14 = stablehlo.add %4, %13 : tensor<2x1xi32>
    %15 = stablehlo.select %12, %14, %4 : tensor<2x1xi1>, tensor<2x1xi32>
    return %15 : tensor<2x1xi32>
  }
  func.func private @_where_1(%arg0: tensor<i1>, %arg1: tensor<i32>, %arg2: tensor<i32>) -> tensor<i32> {
    %0 = stablehlo.select %arg0, %arg1, %arg2 : tensor<i1>, tensor<i32>
    return %0 : tensor<i32>
  }
  func.func private @floor_divide(%arg0: tensor<2xi32>, %arg1: tensor<i32>) -> tensor<2xi32> {
    %0 = stablehlo.convert %arg1 : tensor<i32>
    %1 = stablehlo.broadcast_in_dim %0, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %2 = stablehlo.divide %arg0, %1 : tensor<2xi32>
    %3 = stablehlo.sign %arg0 : tensor<2xi32>
    %4 = stablehlo.sign %0 : tensor<i32>
    %5 = stablehlo.broadcast_in_dim %4, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %6 = stablehlo.compare NE, %3, %5, SIGNED : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %7 = stablehlo.broadcast_in_dim %0, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %8 = stablehlo.remainder %arg0, %7 : tensor<2xi32>
    %c = stablehlo.constant dense<0> : tensor<i32>
    %9 = stablehlo.broadcast_in_dim %c, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %10 = stablehlo.compare NE, %8, %9, SIGNED : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %11 = stablehlo.and %6, %10 : tensor<2xi1>
    %c_0 = stablehlo.constant dense<1> : tensor<i32>
    %12 = stablehlo.broadcast_in_dim %c_0, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %13 = stablehlo.subtract %2, %12 : tensor<2xi32>
    %14 = call @_where_2(%11, %13, %2) : (tensor<2xi1>, tensor<2xi32>, tensor<2xi32>) -> tensor<2xi32>
    return %14 : tensor<2xi32>
  }
  func.func private @_where_2(%arg0: tensor<2xi1>, %arg1: tensor<2xi32>, %arg2: tensor<2xi32>) -> tensor<2xi32> {
    %0 = stablehlo.select %arg0, %arg1, %arg2 : tensor<2xi1>, tensor<2xi32>
    return %0 : tensor<2xi32>
  }
  func.func private @remainder_3(%arg0: tensor<2x31xi32>, %arg1: tensor<i32>) -> tensor<2x31xi32> {
    %0 = stablehlo.convert %arg1 : tensor<i32>
    %c = stablehlo.constant dense<0> : tensor<i32>
    %1 = stablehlo.compare EQ, %0, %c, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>
    %c_0 = stablehlo.constant dense<1> : tensor<i32>
    %2 = call @_where_1(%1, %c_0, %0) : (tensor<i1>, tensor<i32>, tensor<i32>) -> tensor<i32>
    %3 = stablehlo.broadcast_in_dim %2, dims = [] : (tensor<i32>) -> tensor<2x31xi32>
    %4 = stablehlo.remainder %arg0, %3 : tensor<2x31xi32>
    %c_1 = stablehlo.constant dense<0> : tensor<i32>
    %5 = stablehlo.broadcast_in_dim %c_1, dims = [] : (tensor<i32>) -> tensor<2x31xi32>
    %6 = stablehlo.compare NE, %4, %5, SIGNED : (tensor<2x31xi32>, tensor<2x31xi32>) -> tensor<2x31xi1>
    %c_2 = stablehlo.constant dense<0> : tensor<i32>
    %7 = stablehlo.broadcast_in_dim %c_2, dims = [] : (tensor<i32>) -> tensor<2x31xi32>
    %8 = stablehlo.compare LT, %4, %7, SIGNED : (tensor<2x31xi32>, tensor<2x31xi32>) -> tensor<2x31xi1>
    %c_3 = stablehlo.constant dense<0> : tensor<i32>
    %9 = stablehlo.compare LT, %2, %c_3, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>
    %10 = stablehlo.broadcast_in_dim %9, dims = [] : (tensor<i1>) -> tensor<2x31xi1>
    %11 = stablehlo.compare NE, %8, %10, UNSIGNED : (tensor<2x31xi1>, tensor<2x31xi1>) -> tensor<2x31xi1>
    %12 = stablehlo.and %11, %6 : tensor<2x31xi1>
    %13 = stablehlo.broadcast_in_dim %2, dims = [] : (tensor<i32>) -> tensor<2x31xi32>
    %14 = stablehlo.add %4, %13 : tensor<2x31xi32>
    %15 = stablehlo.select %12, %14, %4 : tensor<2x31xi1>, tensor<2x31xi32>
    return %15 : tensor<2x31xi32>
  }
  func.func private @_where_4(%arg0: tensor<2xi1>, %arg1: tensor<i32>, %arg2: tensor<2xi32>) -> tensor<2xi32> {
    %0 = stablehlo.convert %arg1 : tensor<i32>
    %1 = stablehlo.broadcast_in_dim %0, dims = [] : (tensor<i32>) -> tensor<2xi32>
    %2 = stablehlo.select %arg0, %1, %arg2 : tensor<2xi1>, tensor<2xi32>
    return %2 : tensor<2xi32>
  }
  func.func private @_where_5(%arg0: tensor<2x1x1x1xi1>, %arg1: tensor<2x1x8x64xbf16>, %arg2: tensor<i32>) -> tensor<2x1x8x64xbf16> {
    %0 = stablehlo.convert %arg2 : (tensor<i32>) -> tensor<bf16>
    %1 = stablehlo.broadcast_in_dim %arg0, dims = [0, 1, 2, 3] : (tensor<2x1x1x1xi1>) -> tensor<2x1x8x64xi1>
    %2 = stablehlo.broadcast_in_dim %0, dims = [] : (tensor<bf16>) -> tensor<2x1x8x64xbf16>
    %3 = stablehlo.select %1, %arg1, %2 : tensor<2x1x8x64xi1>, tensor<2x1x8x64xbf16>
    return %3 : tensor<2x1x8x64xbf16>
  }
  func.func private @_where_6(%arg0: tensor<2x1x1xi1>, %arg1: tensor<f32>, %arg2: tensor<2x1x256xbf16>) -> tensor<2x1x256xbf16> {
    %0 = stablehlo.convert %arg1 : (tensor<f32>) -> tensor<bf16>
    %1 = stablehlo.broadcast_in_dim %arg0, dims = [0, 1, 2] : (tensor<2x1x1xi1>) -> tensor<2x1x256xi1>
    %2 = stablehlo.broadcast_in_dim %0, dims = [] : (tensor<bf16>) -> tensor<2x1x256xbf16>
    %3 = stablehlo.select %1, %2, %arg2 : tensor<2x1x256xi1>, tensor<2x1x256xbf16>
    return %3 : tensor<2x1x256xbf16>
  }
}
