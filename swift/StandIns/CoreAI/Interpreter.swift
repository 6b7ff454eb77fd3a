import Foundation
import TTTFormats
import TTTReference

/// Runs the reference network behind the interface of `main`: any number of tokens, three states, logits in float16.
struct Interpreter: Sendable {
    private let network: ReferenceNetwork
    private let layout: StateLayout
    private let groups: StateGroups

    init(bundle: URL) throws {
        network = try StandIn.shared.network(of: bundle)
        let metadata = try JSON(Data(contentsOf: bundle.appendingPathComponent("metadata.json")))
        let state = try JSON((metadata["user_data"]?["com.mlx-ttt.state"]?.string ?? "").utf8)
        layout = try StateLayout(state)
        groups = try StateGroups(state, layout: layout)
        let start = network.start
        guard try layout.start(weights: start.map(\.weights)) == start else {
            throw StandInError("\(bundle.lastPathComponent) describes another state than the model has")
        }
    }

    func run(_ inputs: [String: NDArray], states: [String: NDArray]) throws -> [String: NDArray] {
        guard let ids = inputs["input_ids"]?.scalars(as: Int32.self),
            let positions = inputs["position_ids"]?.shape.last, positions >= ids.count
        else { throw StandInError("main without input_ids, or with fewer position_ids than those") }
        let start = network.start
        let phase = (positions - ids.count) % layout.miniBatchSize
        var layers = layout.unpack(groups.together(states.mapValues(\.numbers)), start: start, offset: phase)
        guard layers.allSatisfy({ Self.filled($0.rows) <= phase }) else {
            throw StandInError("main at phase \(phase) of a mini-batch that holds more")
        }
        var logits: [Float] = []
        for id in ids { logits += network.logits(try network.read(Int(id), &layers)) }
        for (name, values) in groups.apart(layout.pack(layers, start: start)) { states[name]?.fill(numbers: values) }
        let array = NDArray(
            scalars: logits.map { Float16($0) }, shape: [1, ids.count, network.configuration.vocabularySize])
        return ["logits": array]
    }

    /// How many rows of an open mini-batch are not zero, [1, H, K, R].
    private static func filled(_ rows: Tensor) -> Int {
        let (K, R) = (rows.shape[2], rows.shape[3])
        let slots = rows.values.indices.filter { rows.values[$0] != 0 }.map { $0 / R % K }
        return (slots.max() ?? -1) + 1
    }
}
