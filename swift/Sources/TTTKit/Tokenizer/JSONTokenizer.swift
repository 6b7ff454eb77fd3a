import Foundation
import TTTFormats

/// The tokenizer of a model directory: `tokenizer.json` and `tokenizer_config.json`.
///
/// It knows byte pair encoding, with SentencePiece's pieces or with bytes, and unigram models, and gives the ids that
/// the library `tokenizers` gives. What it does not know it refuses when it is loaded.
public struct JSONTokenizer: TTTTokenizer {
    private enum Model: Sendable {
        case bytePairs(BytePairEncoding)
        case unigram(Unigram)
    }

    private let model: Model
    private let normalizer: Normalizer
    private let preTokenizer: PreTokenizer
    private let asWritten: AddedTokens
    private let normalized: AddedTokens
    private let template: [Template]
    private let pieces: [Piece]
    private let isByteLevel: Bool
    private let settings: JSON
    private var templateFile: String?

    /// Every token by its text, those that were added included.
    package let vocabulary: [(token: String, id: Int)]
    /// As the tokenizer's decoder treats them.
    public private(set) var leadingSpaces = LeadingSpaces.kept

    private enum Template: Sendable {
        case token(Int)
        case text
    }

    /// - Parameter folder: with `tokenizer.json` and, where there is one, `tokenizer_config.json`.
    /// - Throws: `TTTError.unreadableFile`, or `.unsupported` for a tokenizer of a kind that is not known here.
    public init(folder: URL) throws {
        func json(_ name: String) throws -> JSON {
            do {
                return try JSON(Data(contentsOf: folder.appendingPathComponent(name)))
            } catch {
                throw TTTError.unreadableFile(name, error.localizedDescription)
            }
        }
        let hasSettings = FileManager.default.fileExists(
            atPath: folder.appendingPathComponent("tokenizer_config.json").path)
        try self.init(json("tokenizer.json"), settings: hasSettings ? json("tokenizer_config.json") : .object([]))
        templateFile = try? String(contentsOf: folder.appendingPathComponent("chat_template.jinja"), encoding: .utf8)
    }

    init(_ json: JSON, settings: JSON) throws {
        guard let model = json["model"] else { throw TTTError.damaged("tokenizer.json has no model") }
        let added = json["added_tokens"]?.array ?? []
        let known = try Self.tokens(of: model)
        var vocabulary: [[UInt8]: Int] = [:]
        for (token, id) in known { vocabulary[Array(token.utf8)] = id }
        switch model["type"]?.string ?? "" {
        case "BPE": self.model = .bytePairs(try BytePairEncoding(model, vocabulary: vocabulary))
        case "Unigram": self.model = .unigram(try Unigram(model, vocabulary: vocabulary))
        case let type: throw TTTError.unsupported("tokenizer.json has a \(type) model, which is not known here")
        }
        normalizer = try Normalizer(json["normalizer"])
        preTokenizer = try PreTokenizer(json["pre_tokenizer"])
        let isPlain = settings["split_special_tokens"]?.bool ?? false  // then special tokens in a text are text
        let wanted = added.filter { !(isPlain && $0["special"]?.bool == true) }
        asWritten = try AddedTokens(wanted.filter { $0["normalized"]?.bool != true })
        normalized = try AddedTokens(wanted.filter { $0["normalized"]?.bool == true }, normalizer: normalizer)
        template = try Self.template(json["post_processor"])
        self.settings = settings
        var all = known
        for token in added {
            guard let text = token["content"]?.string, let id = token["id"]?.int, (0..<10_000_000).contains(id) else {
                throw TTTError.damaged("added_tokens of tokenizer.json")
            }
            if vocabulary.updateValue(id, forKey: Array(text.utf8)) == nil { all.append((text, id)) }
        }
        self.vocabulary = all
        isByteLevel = Decoder.isByteLevel(json["decoder"])
        pieces = Pieces.all(all, added: added, decoder: json["decoder"], settings: settings)
        guard Decoder.strips(json["decoder"]) else { return }
        leadingSpaces = .first
        // A tokenizer that makes one space of several keeps none at the start.
        let doubled = try encode("a  a", addingSpecialTokens: false)
        if doubled == (try encode("a a", addingSpecialTokens: false)) {
            leadingSpaces = .none
        }
    }

    private static func tokens(of model: JSON) throws -> [(token: String, id: Int)] {
        if let members = model["vocab"]?.members {
            return try members.map { member in
                guard let id = member.value.int, (0..<10_000_000).contains(id) else {
                    throw TTTError.damaged("an id of tokenizer.json")
                }
                return (member.key, id)
            }
        }
        return try (model["vocab"]?.array ?? []).enumerated().map { id, entry in
            guard let token = entry.array?.first?.string else { throw TTTError.damaged("a piece of tokenizer.json") }
            return (token, id)
        }
    }

    private static func template(_ json: JSON?) throws -> [Template] {
        guard let json, !json.isNull else { return [.text] }
        switch json["type"]?.string ?? "" {
        case "ByteLevel": return [.text]
        case "Sequence":
            return try (json["processors"]?.array ?? []).map(template).first { $0.count > 1 } ?? [.text]
        case "TemplateProcessing":
            return try (json["single"]?.array ?? []).flatMap { step -> [Template] in
                guard let name = step["SpecialToken"]?["id"]?.string else { return [.text] }
                guard let ids = json["special_tokens"]?[name]?["ids"]?.array?.compactMap(\.int) else {
                    throw TTTError.damaged("special_tokens of tokenizer.json")
                }
                return ids.map { .token($0) }
            }
        case let type: throw TTTError.unsupported("tokenizer.json has a post-processor \(type), which is not known here")
        }
    }

    /// Ids of a text, those that the library `tokenizers` gives.
    ///
    /// - Throws: `TTTError.unsupported` for a character that a unigram model without an unknown token has no token for.
    public func encode(_ text: String, addingSpecialTokens: Bool) throws -> [Int] {
        var ids: [Int] = []
        for (index, part) in asWritten.split(Array(text.utf8)).enumerated() {
            switch part {
            case .token(let id): ids.append(id)
            case .text(let text): ids += try encodePart(text, isFirst: index == 0)
            }
        }
        guard addingSpecialTokens else { return ids }
        return template.flatMap { step in
            switch step {
            case .token(let id): [id]
            case .text: ids
            }
        }
    }

    private func encodePart(_ text: [UInt8], isFirst: Bool) throws -> [Int] {
        var ids: [Int] = []
        for (index, part) in normalized.split(normalizer(text)).enumerated() {
            switch part {
            case .token(let id): ids.append(id)
            case .text(let text):
                for piece in preTokenizer([text], isFirst: isFirst && index == 0) {
                    switch model {
                    case .bytePairs(let encode): ids += encode(piece)
                    case .unigram(let encode): ids += try encode(piece)
                    }
                }
            }
        }
        return ids
    }

    /// What a token adds to a text, in UTF-8; nothing for control tokens and ids that there are not.
    public func bytes(of token: Int) -> [UInt8] {
        pieces.indices.contains(token) ? pieces[token].bytes : []
    }

    /// Of byte-level tokenizers all are `.bytes`; of the others those that stand for a byte.
    public func kind(of token: Int) -> TTTTokenKind {
        pieces.indices.contains(token) ? pieces[token].kind : isByteLevel ? .bytes : .text
    }

    /// The text of a token that `tokenizer_config.json` names, such as `bos_token`.
    package func special(_ name: String) -> String? {
        settings[name]?.string ?? settings[name]?["content"]?.string
    }

    /// The chat template that lies beside the tokenizer or in its settings; nil if there is none.
    ///
    /// - Throws: `TTTError.unsupported` for one that is not understood.
    public func chatTemplate() throws -> ChatTemplate? {
        guard let source = templateFile ?? settings["chat_template"]?.string else { return nil }
        let names = ["bos_token", "eos_token", "unk_token", "pad_token"]
        let tokens = names.compactMap { name in special(name).map { (name, $0) } }
        return try ChatTemplate(source, tokens: Dictionary(tokens) { $1 })
    }
}
