import Foundation
import TTTFormats
import TTTReference

/// Runs the reference network behind the interface of an exported package: float16 state and logits.
struct Interpreter {
    struct Result {
        let logits: [UInt16]
        /// Float32 by name, [layers, heads, T]; zero for tokens that do not count.
        let signals: [String: [Float]]
        let state: [UInt16]
        let phase: Int
    }

    private let network: ReferenceNetwork
    private let layout: StateLayout

    init(package: URL, metadata: [String: String]) throws {
        network = try StandIn.shared.network(of: package)
        layout = try StateLayout(JSON((metadata["com.mlx-ttt.state"] ?? "").utf8))
        let start = network.start
        guard try layout.start(weights: start.map(\.weights)) == start else {
            throw StandInError("\(package.lastPathComponent) describes another state than the model has")
        }
    }

    /// One call of `decode` (with `position`) or `prefill` (with `length`).
    func run(_ inputs: [String: MLMultiArray], state: [UInt16], phase known: Int?) throws -> Result {
        guard let ids = inputs["inputIds"]?.scalars(as: Int32.self) else { throw StandInError("no inputIds") }
        let K = layout.miniBatchSize
        let values = state.map(Half.float)
        let start = network.start
        let phase: Int
        let count: Int
        if let position = inputs["position"]?.scalars(as: Int32.self).first {
            (phase, count) = (Int(position), 1)
            guard (0..<K).contains(phase), known ?? phase == phase else {
                throw StandInError("decode at position \(position), but the mini-batch holds \(known ?? -1)")
            }
        } else if let length = inputs["length"]?.scalars(as: Int32.self).first {
            (phase, count) = (0, Int(length))
            guard (1...ids.count).contains(count) else { throw StandInError("prefill with length \(length)") }
            let rows = layout.unpack(values, start: start, offset: 0).flatMap(\.rows.values)
            guard known ?? 0 == 0, rows.allSatisfy({ $0 == 0 }) else {
                throw StandInError("prefill at phase \(known ?? -1) of a mini-batch")
            }
        } else {
            throw StandInError("neither position nor length")
        }
        var layers = layout.unpack(values, start: start, offset: phase)
        let learning = inputs["learning"].map { array in
            Tensor(
                shape: array.shape.map(\.intValue),
                values: array.scalars(as: UInt32.self).map { Float(bitPattern: $0) })
        }
        guard learning == nil || learning?.shape == [layout.layers, layout.heads] else {
            throw StandInError("learning is no [layers, heads]")
        }
        var hidden: [Float] = []
        var seen: [TTTSignals] = []
        for id in ids.prefix(count) {
            let (output, signals) = try network.observe(Int(id), &layers, learning: learning)
            hidden = output
            seen.append(signals)
        }
        func byHead(_ signal: (TTTSignals) -> Tensor) -> [Float] {
            let tokens = seen.map { signal($0).values }
            let padding = [Float](repeating: 0, count: ids.count - count)
            return (0..<layout.layers * layout.heads).flatMap { head in tokens.map { $0[head] } + padding }
        }
        return Result(
            logits: network.logits(hidden).map(Half.bits),
            signals: ["loss": byHead(\.loss), "lr": byHead(\.learningRate), "writeNorm": byHead(\.writeNorm)],
            state: layout.pack(layers, start: start).map(Half.bits),
            phase: (phase + count) % K)
    }
}
