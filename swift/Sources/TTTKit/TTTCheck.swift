import Foundation

/// How a model and a tokenizer on this device compare with the `expected.json` beside the package.
public struct TTTCheck: Sendable, Equatable {
    /// Texts that get other token ids.
    public private(set) var differingTexts: [String] = []
    /// Prompts that are continued otherwise by the likeliest tokens. Where two are nearly as likely, this may be.
    public private(set) var differingPrompts: [String] = []
    /// The largest difference of a logit, as a share of the largest logit.
    public private(set) var logitDifference = 0.0

    /// Runs the comparison. The model's text is lost.
    public init(model: any TTTModel, tokenizer: any TTTTokenizer, expected file: URL) async throws {
        let expected: Expected
        do {
            expected = try JSONDecoder().decode(Expected.self, from: Data(contentsOf: file))
        } catch {
            throw TTTError.unreadableFile(file.lastPathComponent, error.localizedDescription)
        }
        for text in expected.tokenization + expected.prompts.map(\.tokenization) {
            let ids = try tokenizer.encode(text.text, addingSpecialTokens: true)
            if ids != text.ids { differingTexts.append(text.text) }
        }
        for prompt in expected.prompts {
            let logits = try await Self.logits(of: model, after: prompt.prompt_ids)
            let largest = prompt.top_logits.map { abs($0.logit) }.max() ?? 1
            for entry in prompt.top_logits {
                guard logits.indices.contains(entry.id) else {
                    throw TTTError.tokenOutsideVocabulary(entry.id, size: logits.count)
                }
                logitDifference = max(logitDifference, abs(Double(logits[entry.id]) - entry.logit) / largest)
            }
            let generator = TTTGenerator(model: model, tokenizer: tokenizer)
            try await generator.reset()
            var text = ""
            let options = TTTOptions(maxTokens: prompt.greedy_ids.count)
            for try await piece in generator.generate(prompt.prompt, options: options) { text += piece }
            if text != prompt.greedy_text { differingPrompts.append(prompt.prompt) }
        }
    }

    /// By single steps, so that `generate`, which reads in blocks, is compared with them too.
    private static func logits(of model: any TTTModel, after tokens: [Int]) async throws -> [Float] {
        try await model.reset()
        var logits: [Float] = []
        let size = model.info.vocabularySize
        for (position, token) in tokens.enumerated() {
            guard (0..<size).contains(token) else { throw TTTError.tokenOutsideVocabulary(token, size: size) }
            logits = try await model.decode(token, position: position % model.info.miniBatchSize)
        }
        return logits
    }

    /// `expected.json`, by the names there.
    private struct Expected: Decodable {
        struct Tokenization: Decodable {
            let text: String
            let ids: [Int]
        }

        struct Logit: Decodable {
            let id: Int
            let logit: Double
        }

        struct Prompt: Decodable {
            let prompt: String
            let prompt_ids: [Int]
            let top_logits: [Logit]
            let greedy_ids: [Int]
            let greedy_text: String

            var tokenization: Tokenization { Tokenization(text: prompt, ids: prompt_ids) }
        }

        let prompts: [Prompt]
        let tokenization: [Tokenization]
    }
}
