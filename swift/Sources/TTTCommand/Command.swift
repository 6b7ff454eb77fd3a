import Foundation
import TTTFormats
import TTTKit

/// The commands of `ttt`. Text goes to `output` as it comes, remarks to `remarks`.
package struct Command: Sendable {
    private let output: @Sendable (String) -> Void
    private let remarks: @Sendable (String) -> Void
    private let nextLine: @Sendable () -> String?

    private static let sampling: Set = [
        "model", "max-tokens", "temperature", "top-p", "top-k", "min-p", "repetition-penalty", "seed", "stop", "save-state",
        "load-state", "learning",
    ]
    private static let usage = """
        ttt generate --model DIR --prompt TEXT [--save-state FILE] [--load-state FILE] [--max-tokens N] [--temperature F]
                     [--top-p F] [--top-k N] [--min-p F] [--repetition-penalty F] [--seed N] [--stop TEXT]
                     [--learning F]
        ttt chat --model DIR [the same options]
        ttt state show FILE
        ttt verify --model DIR
        """

    package init(
        output: @escaping @Sendable (String) -> Void, remarks: @escaping @Sendable (String) -> Void,
        nextLine: @escaping @Sendable () -> String?
    ) {
        self.output = output
        self.remarks = remarks
        self.nextLine = nextLine
    }

    /// - Returns: the exit status: 0, or 2 after an error, of which one line has been said.
    package func run(_ arguments: [String]) async -> Int32 {
        do {
            let rest = Array(arguments.dropFirst())
            switch arguments.first {
            case "generate": try await generate(Arguments(rest, names: Self.sampling.union(["prompt"])))
            case "chat": try await chat(Arguments(rest, names: Self.sampling))
            case "state": try showState(Arguments(rest, names: []))
            case "verify": return try await verify(Arguments(rest, names: ["model"]))
            case "--help", "-h", "help": output(Self.usage + "\n")
            default: throw TTTError.invalidOption("The commands are generate, chat, state show and verify; see ttt --help")
            }
            return 0
        } catch {
            remarks("ttt: \(error.localizedDescription)\n")
            return 2
        }
    }

    private func generate(_ arguments: Arguments) async throws {
        let (generator, options) = try await open(arguments)
        try await write(generator, arguments.text("prompt") ?? "", options)
        try await finish(generator, arguments)
    }

    /// Each line of input is read, then the model writes up to the stop text, by default a blank line.
    private func chat(_ arguments: Arguments) async throws {
        var (generator, options) = try await open(arguments)
        if options.stopStrings.isEmpty { options.stopStrings = ["\n\n"] }
        while let line = nextLine() {
            try await write(generator, line + "\n", options)
        }
        try await finish(generator, arguments)
    }

    private func showState(_ arguments: Arguments) throws {
        guard arguments.words.count == 2, arguments.words[0] == "show" else {
            throw TTTError.invalidOption("Write: ttt state show FILE")
        }
        let state = try TextState(contentsOf: URL(fileURLWithPath: arguments.words[1]))
        let name = URL(fileURLWithPath: arguments.words[1]).lastPathComponent
        let inner = state.layers[0].weights.count > 2 ? "TTT-MLP" : "TTT-Linear"
        let heads = state.layers[0].rows.shape.dropFirst().first ?? 0
        let count = state.position + min(state.tokens.count, 1)
        output("\(name): \(count) tokens, for \(inner) with \(state.layers.count) layers of \(heads) heads,")
        output(" fingerprint \(state.fingerprint.prefix(16))\n")
        if !state.pending.isEmpty { output("\(state.pending.count) tokens of its text have not been read yet\n") }
    }

    /// Compares with the `expected.json` beside a package.
    private func verify(_ arguments: Arguments) async throws -> Int32 {
        let directory = URL(fileURLWithPath: try arguments.required("model"))
        let opened = try await OpenedModel(directory)
        remarks(opened.remark)
        let check = try await TTTCheck(
            model: opened.model, tokenizer: opened.tokenizer, expected: directory.appendingPathComponent("expected.json"))
        output("texts with other ids: \(check.differingTexts.count)\n")
        output("prompts continued otherwise: \(check.differingPrompts.count)\n")
        output("largest difference of a logit: \(check.logitDifference) of the largest\n")
        return check.differingTexts.isEmpty && check.differingPrompts.isEmpty ? 0 : 1
    }

    private func open(_ arguments: Arguments) async throws -> (TTTGenerator, TTTOptions) {
        let options = TTTOptions(
            maxTokens: try arguments.value("max-tokens", default: 256),
            temperature: try arguments.value("temperature", default: 0.0), topK: try arguments.value("top-k", default: 0),
            topP: try arguments.value("top-p", default: 1.0), minP: try arguments.value("min-p", default: 0.0),
            repetitionPenalty: try arguments.value("repetition-penalty", default: 1.0),
            seed: try arguments.text("seed").map { _ in try arguments.value("seed", default: UInt64(0)) },
            stopStrings: arguments.text("stop").map { [$0] } ?? [])
        let opened = try await OpenedModel(URL(fileURLWithPath: try arguments.required("model")))
        remarks(opened.remark)
        let generator = TTTGenerator(model: opened.model, tokenizer: opened.tokenizer)
        if arguments.text("learning") != nil {
            try await generator.setLearning(arguments.value("learning", default: 1))
        }
        if let file = arguments.text("load-state") {
            for warning in try await generator.load(from: URL(fileURLWithPath: file)) { remarks(warning + "\n") }
        }
        return (generator, options)
    }

    private func write(_ generator: TTTGenerator, _ prompt: String, _ options: TTTOptions) async throws {
        for try await piece in generator.generate(prompt, options: options) { output(piece) }
        output("\n")
        let speed = await generator.speed
        remarks("\(speed.promptTokens) + \(speed.tokens) tokens, \(Int(speed.tokensPerSecond.rounded())) tokens/s\n")
    }

    private func finish(_ generator: TTTGenerator, _ arguments: Arguments) async throws {
        if let file = arguments.text("save-state") { try await generator.save(to: URL(fileURLWithPath: file)) }
    }
}
