import Foundation
import TTTFormats

/// One turn of a conversation.
public struct ChatMessage: Sendable, Equatable {
    /// "system", "user" or "assistant".
    public var role: String
    /// What is said.
    public var content: String

    /// A turn of `role`, which says `content`.
    public init(role: String, content: String) {
        self.role = role
        self.content = content
    }
}

/// A model's chat template: the part of Jinja that common templates use. What it has not is refused when it is loaded.
///
/// It has texts, `{{ … }}`, `for`, `if`, `set`, comments and their white space control; `and`, `or`, `not`, comparisons, `in`,
/// `is defined`, `+`, `~`, `%`; attributes, indices, slices; the filters `trim`, `length`, `upper`, `lower`; `strip()`,
/// `namespace` and `raise_exception`.
public struct ChatTemplate: Sendable {
    private let nodes: [TemplateNode]
    private let constants: [String: TemplateValue]

    /// - Parameters:
    ///   - source: the template.
    ///   - tokens: texts that it may name, such as `bos_token`.
    /// - Throws: `TTTError.unsupported`.
    public init(_ source: String, tokens: [String: String] = [:]) throws {
        var parser = TemplateParser(pieces: try TemplateLexer.pieces(of: source))
        nodes = try parser.nodes(until: []).nodes
        constants = tokens.mapValues { .text($0) }
    }

    /// The text that the model reads.
    ///
    /// - Parameter addingGenerationPrompt: whether it ends where an answer begins.
    /// - Throws: `TTTError.unsupported` with what the template itself has to say of these messages.
    public func callAsFunction(_ messages: [ChatMessage], addingGenerationPrompt: Bool = true) throws -> String {
        var scope = TemplateScope(constants)
        scope["messages"] = .list(messages.map { ["role": .text($0.role), "content": .text($0.content)] }.map { .record($0) })
        scope["add_generation_prompt"] = .flag(addingGenerationPrompt)
        var output = ""
        for node in nodes { try node.write(to: &output, &scope) }
        return output
    }
}
