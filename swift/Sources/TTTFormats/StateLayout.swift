/// Where everything is in the one array that an exported model keeps as its state, [layers, H, R, D].
///
/// It holds weights as changes since the start of the text, so that zeros are the state before the first token. The
/// features of a head stand in another order than in a model directory: the pairs that RoPE rotates, (2m, 2m + 1), lie
/// half a row apart. Matrices that widen are transposed. `mlx_ttt/export/layout.py` is where this comes from.
package struct StateLayout: Sendable, Equatable {
    /// [layers, H, R, width]; rows are filled up with zeros from D to the width.
    package let shape: [Int]
    package let headDim: Int
    package let miniBatchSize: Int
    /// The rows of each part of the description.
    package let extents: [String: Range<Int>]
    private let parts: [Part]

    private struct Part: Equatable {
        enum Home: Equatable {
            case weight(Int)
            case rows
            case history(String)
        }

        let home: Home
        let firstRow: Int
        /// For each number of a head's part, where it is in the head's own array.
        let places: [Int]
        /// From a head's first number to that of the next.
        let headStride: Int
    }

    /// Of a head dimension, a mini-batch and a history; no model is near it.
    private static let largest = 1024

    package var layers: Int { shape[0] }
    package var heads: Int { shape[1] }
    package var count: Int { shape.reduce(1, *) }

    /// - Parameter description: the entry `com.mlx-ttt.state` of a package's metadata.
    /// - Throws: `TTTError.notATTTPackage` if it does not describe a layout.
    package init(_ description: JSON) throws {
        let damage = TTTError.notATTTPackage("com.mlx-ttt.state describes no state")
        guard let shape = description["shape"]?.array?.compactMap(\.int), shape.count == 4,
            shape.allSatisfy({ (1...1_000_000).contains($0) }), shape.reduce(1.0, { $0 * Double($1) }) < 1e9,
            let headDim = description["head_dim"]?.int, headDim > 0, headDim <= shape[3], shape[3] <= Self.largest,
            headDim % 2 == 0,
            let members = description["parts"]?.members
        else { throw damage }
        var extents: [String: Range<Int>] = [:]
        for part in members {
            guard let numbers = part.value.array?.compactMap(\.int), numbers.count == 2,
                (0...shape[2]).contains(numbers[0]), (0...shape[2] - numbers[0]).contains(numbers[1])
            else { throw damage }
            extents[part.key] = numbers[0]..<(numbers[0] + numbers[1])
        }
        guard let miniBatchSize = extents["k"]?.count, miniBatchSize > 0,
            ["k", "conv", "conv_qk"].allSatisfy({ extents[$0]?.count ?? 0 <= Self.largest })
        else { throw damage }
        (self.shape, self.headDim, self.miniBatchSize, self.extents) = (shape, headDim, miniBatchSize, extents)
        parts = try Self.parts(extents, heads: shape[1], headDim: headDim).map { part in
            guard let part else { throw damage }
            return part
        }
        guard parts.count == extents.count, parts.reduce(0, { $0 + $1.places.count }) == shape[2] * headDim else {
            throw damage
        }
    }

    /// Nil for a part that has another number of rows than it needs, or is missing.
    private static func parts(_ extents: [String: Range<Int>], heads: Int, headDim D: Int) -> [Part?] {
        let K = extents["k"]?.count ?? 0
        let isMLP = extents["W2"] != nil
        let wide = isMLP ? 4 * D : D
        let rowWidth = isMLP ? 10 * D : 2 * D
        let feature = Array(stride(from: 0, to: D, by: 2)) + Array(stride(from: 1, to: D, by: 2))
        let own = Array(0..<wide)
        let hidden = isMLP ? own : feature  // the order of what is `wide`

        func part(_ name: String, _ home: Part.Home, headStride: Int, _ places: [Int]) -> Part? {
            guard let rows = extents[name], rows.count * D == places.count else { return nil }
            return Part(home: home, firstRow: rows.lowerBound, places: places, headStride: headStride)
        }
        func matrix(_ rows: [Int], _ columns: [Int]) -> [Int] {
            rows.flatMap { row in columns.map { row * columns.count + $0 } }
        }
        func row(from offset: Int, _ columns: [Int]) -> [Int] {
            (0..<K).flatMap { slot in columns.map { slot * rowWidth + offset + $0 } }
        }
        func inputs(_ name: String, _ columns: [Int]) -> [Int] {
            (0..<(extents[name]?.count ?? 0)).flatMap { time in columns.map { time * heads * D + $0 } }
        }

        let first = isMLP ? own.flatMap { column in feature.map { $0 * wide + column } } : matrix(feature, feature)
        var parts = [
            part("W1", .weight(0), headStride: D * wide, first),
            part("b1", .weight(1), headStride: wide, hidden),
            part("k", .rows, headStride: K * rowWidth, row(from: 0, feature)),
            part("e1", .rows, headStride: K * rowWidth, row(from: D, hidden)),
        ]
        if isMLP {
            parts += [
                part("W2", .weight(2), headStride: wide * D, matrix(own, feature)),
                part("b2", .weight(3), headStride: D, feature),
                part("x2", .rows, headStride: K * rowWidth, row(from: 5 * D, own)),
                part("e2", .rows, headStride: K * rowWidth, row(from: 9 * D, feature)),
            ]
        }
        if extents["conv"] != nil {
            parts.append(part("conv", .history("conv"), headStride: D, inputs("conv", Array(0..<D))))
        }
        if extents["conv_qk"] != nil {
            parts.append(part("conv_qk", .history("conv_qk"), headStride: D, inputs("conv_qk", feature)))
        }
        return parts
    }

    /// The state before the first token, with these start weights.
    ///
    /// - Parameter weights: of each layer, [1, H, ·, ·].
    /// - Throws: `TTTError.notATTTPackage` if they do not belong to this layout.
    package func start(weights: [[Tensor]]) throws -> [LayerState] {
        guard weights.count == layers else { throw TTTError.notATTTPackage("start weights of \(weights.count) layers") }
        let isMLP = parts.contains { $0.home == .weight(2) }
        let (H, D) = (heads, headDim)
        let shapes = isMLP
            ? [[1, H, D, 4 * D], [1, H, 1, 4 * D], [1, H, 4 * D, D], [1, H, 1, D]] : [[1, H, D, D], [1, H, 1, D]]
        var history: [String: Tensor] = [:]
        for part in parts {
            if case .history(let name) = part.home {
                history[name] = Tensor(zeros: [1, part.places.count / D, H * D])
            }
        }
        return try weights.map { weights in
            guard weights.map(\.shape) == shapes else { throw TTTError.notATTTPackage("start weights of other shapes") }
            let rows = Tensor(zeros: [1, H, miniBatchSize, isMLP ? 10 * D : 2 * D])
            return LayerState(offset: 0, weights: weights, rows: rows, history: history)
        }
    }

    /// A state in this layout, [layers, H, R, width].
    ///
    /// - Precondition: both have the shapes of `start(weights:)`.
    package func pack(_ state: [LayerState], start: [LayerState]) -> [Float] {
        var packed = [Float](repeating: 0, count: count)
        for (layer, (now, then)) in zip(state, start).enumerated() {
            for part in parts {
                var source = Self.array(part.home, of: now)
                if case .weight(let index) = part.home { source = Self.sum(source, then.weights[index].values, -1) }
                copy(part, layer: layer, packed: &packed, own: &source, intoPacked: true)
            }
        }
        return packed
    }

    /// The inverse of `pack`.
    ///
    /// - Parameter offset: tokens read.
    package func unpack(_ packed: [Float], start: [LayerState], offset: Int) -> [LayerState] {
        var (state, packed) = (start, packed)
        for (layer, then) in start.enumerated() {
            state[layer].offset = offset
            for part in parts {
                var target = Self.array(part.home, of: state[layer])
                copy(part, layer: layer, packed: &packed, own: &target, intoPacked: false)
                switch part.home {
                case .weight(let index):
                    state[layer].weights[index].values = Self.sum(target, then.weights[index].values, 1)
                case .rows: state[layer].rows.values = target
                case .history(let name): state[layer].history[name]?.values = target
                }
            }
        }
        return state
    }

    /// a + sign · b
    private static func sum(_ a: [Float], _ b: [Float], _ sign: Float) -> [Float] {
        precondition(a.count == b.count)
        var result = a
        result.withUnsafeMutableBufferPointer { result in
            b.withUnsafeBufferPointer { b in
                guard let result = result.baseAddress, let b = b.baseAddress else { return }
                var i = 0
                while i < a.count {
                    result[i] += sign * b[i]
                    i &+= 1
                }
            }
        }
        return result
    }

    private static func array(_ home: Part.Home, of layer: LayerState) -> [Float] {
        switch home {
        case .weight(let index): layer.weights[index].values
        case .rows: layer.rows.values
        case .history(let name): layer.history[name]?.values ?? []
        }
    }

    /// Copies a part of a layer between the packed state and the layer's own array.
    ///
    /// A loop over plain memory, because an app saves the state of a large model while it is being suspended.
    private func copy(_ part: Part, layer: Int, packed: inout [Float], own: inout [Float], intoPacked: Bool) {
        let (D, R, width) = (headDim, shape[2], shape[3])
        precondition(packed.count == count)
        precondition((part.places.max() ?? 0) + (heads - 1) * part.headStride < max(own.count, 1))
        packed.withUnsafeMutableBufferPointer { packed in
            own.withUnsafeMutableBufferPointer { own in
                part.places.withUnsafeBufferPointer { places in
                    guard let packed = packed.baseAddress, let own = own.baseAddress, let places = places.baseAddress
                    else { return }
                    for head in 0..<heads {
                        let first = packed + ((layer * heads + head) * R + part.firstRow) * width
                        let ownFirst = own + head * part.headStride
                        for row in 0..<part.places.count / D {
                            let (here, places) = (first + row * width, places + row * D)
                            var i = 0
                            while i < D {
                                if intoPacked { here[i] = ownFirst[places[i]] } else { ownFirst[places[i]] = here[i] }
                                i &+= 1
                            }
                        }
                    }
                }
            }
        }
    }
}
