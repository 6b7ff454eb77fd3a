// Loops over plain memory, because tests are built without optimization, where an array checks every index.

/// a · b of n numbers.
func dot(_ a: UnsafePointer<Float>, _ b: UnsafePointer<Float>, _ n: Int) -> Float {
    var (s0, s1, s2, s3): (Float, Float, Float, Float) = (0, 0, 0, 0)
    var i = 0
    while i &+ 4 <= n {
        s0 += a[i] * b[i]
        s1 += a[i &+ 1] * b[i &+ 1]
        s2 += a[i &+ 2] * b[i &+ 2]
        s3 += a[i &+ 3] * b[i &+ 3]
        i &+= 4
    }
    while i < n {
        s0 += a[i] * b[i]
        i &+= 1
    }
    return (s0 + s1) + (s2 + s3)
}

/// y += a x, of n numbers.
func add(_ a: Float, _ x: UnsafePointer<Float>, to y: UnsafeMutablePointer<Float>, _ n: Int) {
    var i = 0
    while i < n {
        y[i] += a * x[i]
        i &+= 1
    }
}

/// A weight matrix [rows, columns] as linear layers store it.
struct Matrix: Sendable {
    let rows: Int
    let columns: Int
    let values: [Float]

    /// M x: [columns] -> [rows].
    func callAsFunction(_ x: [Float]) -> [Float] {
        precondition(x.count == columns)
        return values.withUnsafeBufferPointer { matrix in
            x.withUnsafeBufferPointer { x in
                guard let matrix = matrix.baseAddress, let x = x.baseAddress else { return [] }
                return (0..<rows).map { dot(matrix + $0 * columns, x, columns) }
            }
        }
    }

    func row(_ index: Int) -> [Float] {
        Array(values[index * columns..<(index + 1) * columns])
    }
}
