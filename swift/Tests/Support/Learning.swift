import TTTFormats

/// A text that Python read with some learning scale.
package struct LearningCase {
    /// [layers, heads]
    package let learning: Tensor
    /// Token ids of the text.
    package let ids: [Int]
    /// The places of `logits`, [places][V].
    package let positions: [Int]
    package let logits: [[Float]]
    private let signals: [(name: String, values: Tensor, field: (TTTSignals) -> Tensor)]

    /// - Parameters:
    ///   - model: "linear" or "mlp".
    ///   - name: "one", "uneven" or "frozen".
    package init(_ model: String, _ name: String) throws {
        let arrays = try Files.arrays("\(model)-learning.safetensors")
        learning = try arrays.tensor("\(name).learning")
        (ids, positions) = (try arrays.integers("ids"), try arrays.integers("positions"))
        let values = try arrays.tensor("\(name).logits")
        let V = values.shape[1]
        logits = positions.indices.map { Array(values.values[$0 * V..<($0 + 1) * V]) }
        let fields: [(String, (TTTSignals) -> Tensor)] = [
            ("loss", \.loss), ("lr", \.learningRate), ("writeNorm", \.writeNorm),
        ]
        signals = try fields.map { ($0, try arrays.tensor("\(name).\($0)"), $1) }
    }

    /// By signal its largest difference from Python's as a share of the largest; infinite for another number of tokens.
    package func differences(_ found: [TTTSignals]) -> [String: Float] {
        let pairs = signals.map { name, values, field in
            guard found.count == ids.count, found.allSatisfy({ field($0).shape == learning.shape }) else {
                return (name, Float.infinity)
            }
            let largest = values.values.reduce(0) { max($0, abs($1)) }
            let difference = values.values.indices.reduce(Float(0)) { worst, index in
                let mine = field(found[index % ids.count]).values[index / ids.count]
                return max(worst, abs(mine - values.values[index]))
            }
            return (name, difference == 0 ? 0 : difference / largest)
        }
        return Dictionary(uniqueKeysWithValues: pairs)
    }
}
