import SwiftUI
import UniformTypeIdentifiers

/// The texts and the remembered states; beside them the page.
struct LibraryView: View {
    let books: Bookshelf
    let states: StateShelf
    let session: ReadingSession

    @State private var isImporting = false
    @State private var chosen: Set<SavedState.ID> = []
    @State private var comparison: Comparison?
    @State private var column = NavigationSplitViewColumn.sidebar
    @Environment(\.scenePhase) private var scenePhase

    var body: some View {
        NavigationSplitView(preferredCompactColumn: $column) {
            List(selection: $chosen) {
                Section("Texts") {
                    ForEach(books.books) { book in
                        Button(book.title) {
                            session.open(book)
                            column = .detail
                        }
                        .disabled(!session.isResting)
                        .accessibilityHint("Reads this text from the start")
                        .swipeActions {
                            if books.isAdded(book) {
                                Button("Remove", role: .destructive) { books.remove(book) }
                            }
                        }
                    }
                }
                Section("Remembered") {
                    ForEach(states.states) { state in
                        StateRow(state: state)
                            .tag(state.id)
                            .contextMenu {
                                Button("Go back to it") {
                                    session.recall(state)
                                    column = .detail
                                }
                                Button("Remove", role: .destructive) { states.remove(state) }
                            }
                    }
                }
                if let problem = books.problem { ProblemText(problem: problem) }
            }
            .navigationTitle("Reader")
            .toolbar {
                #if os(iOS)
                EditButton()
                #endif
                Button("Add a text", systemImage: "plus") { isImporting = true }
                Button("Compare two states", systemImage: "square.split.2x1") { compare() }
                    .disabled(chosen.count != 2 || !session.isResting)
            }
        } detail: {
            PageView(session: session)
        }
        .fileImporter(isPresented: $isImporting, allowedContentTypes: [.plainText]) { result in
            guard case .success(let file) = result, file.startAccessingSecurityScopedResource() else { return }
            defer { file.stopAccessingSecurityScopedResource() }
            books.add(file)
        }
        .sheet(item: $comparison) { comparison in
            ComparisonView(comparison: comparison, options: session.options)
        }
        .onChange(of: scenePhase) { _, phase in
            if phase == .background { keepInBackground() }
        }
        #if os(iOS)
        .onReceive(NotificationCenter.default.publisher(for: UIApplication.didReceiveMemoryWarningNotification)) { _ in
            Task { await session.memoryWarning() }
        }
        #endif
    }

    private func compare() {
        let two = states.states.filter { chosen.contains($0.id) }
        comparison = session.comparison(of: two)
    }

    /// The system gives some seconds when it is asked for them.
    private func keepInBackground() {
        #if os(iOS)
        let time = UIApplication.shared.beginBackgroundTask()
        Task {
            await session.enterBackground()
            UIApplication.shared.endBackgroundTask(time)
        }
        #else
        Task { await session.enterBackground() }
        #endif
    }
}

private struct StateRow: View {
    let state: SavedState

    var body: some View {
        VStack(alignment: .leading) {
            Text(state.title)
            Text("\(state.tokens) tokens, \(state.date, format: .dateTime)")
                .font(.caption)
                .foregroundStyle(.secondary)
        }
        .accessibilityElement(children: .combine)
    }
}
