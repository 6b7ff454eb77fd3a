import Foundation
import TTTFormats
import TTTKit
import TTTReference

/// A model directory on the reference network: slow, in float32, on every system.
package actor ReferenceTTTModel: TTTModel {
    package nonisolated let info: TTTModelInfo
    private var learning: Tensor?
    private var seen: [TTTSignals] = []
    private let network: ReferenceNetwork
    private let start: [LayerState]
    private var layers: [LayerState]

    /// - Parameter vocabulary: of the tokenizer, which the fingerprint covers.
    package init(directory: URL, vocabulary: [(token: String, id: Int)]) throws {
        network = try ReferenceNetwork(directory: directory)
        let configuration = network.configuration
        var info = try TTTModelInfo(
            miniBatchSize: configuration.miniBatchSize, vocabularySize: configuration.vocabularySize,
            prefillTokens: configuration.miniBatchSize, endTokens: Set(configuration.endTokens),
            fingerprint: Fingerprint.of(directory: directory, vocabulary: vocabulary))
        (info.learningShape, info.givesSignals) = ([configuration.layers, configuration.heads], true)
        self.info = info
        start = network.start
        layers = network.start
    }

    package func prefill(_ block: [Int], length: Int) throws -> [Float] {
        try read(block.prefix(length))
    }

    package func decode(_ token: Int, position: Int) throws -> [Float] {
        try read([token])
    }

    private func read(_ tokens: ArraySlice<Int>) throws -> [Float] {
        var hidden: [Float] = []
        seen = []
        for token in tokens {
            let (output, signals) = try network.observe(token, &layers, learning: learning)
            hidden = output
            seen.append(signals)
        }
        return network.logits(hidden)
    }

    package func setLearning(_ scale: Tensor) throws {
        try info.check(learning: scale)
        learning = scale
    }

    package func signals() -> [TTTSignals] {
        seen
    }

    package func state(position: Int) -> [LayerState] {
        layers
    }

    package func restore(_ state: [LayerState]) throws {
        guard state.count == start.count, zip(state, start).allSatisfy({ $0.hasShape(of: $1) }) else {
            throw TTTError.stateOfAnotherModel
        }
        layers = state
    }

    package func reset() {
        layers = start
    }
}
