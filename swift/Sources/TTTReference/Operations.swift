import Foundation

/// x divided by its root mean square, times weight: [C].
func rmsNorm(_ x: [Float], _ weight: [Float], epsilon: Double) -> [Float] {
    let meanSquare = x.reduce(0.0) { $0 + Double($1) * Double($1) } / Double(x.count)
    let scale = Float(1 / (meanSquare + epsilon).squareRoot())
    return zip(x, weight).map { $0 * scale * $1 }
}

/// x less its mean, divided by its standard deviation; and 1 / that deviation.
func standardized(_ x: [Float]) -> (x: [Float], inverseDeviation: Float) {
    let mean = x.reduce(0.0) { $0 + Double($1) } / Double(x.count)
    let variance = x.reduce(0.0) { $0 + (Double($1) - mean) * (Double($1) - mean) } / Double(x.count)
    let inverse = 1 / (variance + 1e-6).squareRoot()
    return (x.map { Float((Double($0) - mean) * inverse) }, Float(inverse))
}

func layerNorm(_ x: [Float], _ weight: ArraySlice<Float>, _ bias: ArraySlice<Float>) -> [Float] {
    zip(standardized(x).x, zip(weight, bias)).map { $0 * $1.0 + $1.1 }
}

func sigmoid(_ x: Float) -> Float {
    1 / (1 + exp(-x))
}

/// The tanh GELU and its derivative.
func geluAndSlope(_ x: Float) -> (y: Float, slope: Float) {
    let c = Float(0.797_884_560_802_865_4)  // the square root of 2 / pi
    let t = tanh(c * (x + 0.044715 * x * x * x))
    return (0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x))
}

/// Adjacent pairs (2m, 2m + 1) turned by position · theta^(-2m / D): [D].
func rotated(_ x: [Float], position: Int, theta: Double) -> [Float] {
    var y = x
    for first in stride(from: 0, to: x.count, by: 2) {
        let angle = Double(position) * pow(theta, -Double(first) / Double(x.count))
        let (c, s) = (Float(cos(angle)), Float(sin(angle)))
        y[first] = x[first] * c - x[first + 1] * s
        y[first + 1] = x[first + 1] * c + x[first] * s
    }
    return y
}
