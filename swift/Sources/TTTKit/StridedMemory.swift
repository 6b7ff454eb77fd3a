/// Where the scalars of an array lie in memory that may have gaps, against row-major order without any.
package struct StridedMemory {
    /// A run of scalars that are neighbours in both.
    package struct Run: Equatable {
        package var inMemory: Int
        package var packed: Int
        package var count: Int
    }

    package let runs: [Run]

    /// - Parameters:
    ///   - shape: scalars along each dimension.
    ///   - strides: scalars in memory from one to the next along each dimension.
    package init(shape: [Int], strides: [Int]) {
        // The innermost dimensions without gaps make one run.
        var inner = shape.count
        var count = 1
        while inner > 0, strides[inner - 1] == count {
            inner -= 1
            count *= shape[inner]
        }
        var starts = [0]
        for (size, stride) in zip(shape[..<inner], strides[..<inner]) {
            starts = starts.flatMap { start in (0..<size).map { start + $0 * stride } }
        }
        runs = starts.enumerated().map { Run(inMemory: $1, packed: $0 * count, count: count) }
    }
}
